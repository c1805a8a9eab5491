"""How a function that takes groups of options becomes a command with a flat list of them."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from .launched import check_alone
from .options import OutputOptions
from .terminal import Terminal

_CALLED = {"save_to": "save_predictions"}  # what functions call an option otherwise
_WIDEST = 100  # columns of help; lines that are longer are hard to read
_MARGINS = 2  # columns beside it
_CONTINUED = 6  # spaces before what goes on in another line of an example


class _Help:
    """Help where flags and arguments have no type beside them, and `--help` no box of its own."""

    def get_params(self, context: Any) -> list[Any]:
        """What a command takes, as its help shows it."""
        given: list[Any] = super().get_params(context)  # type: ignore[misc]
        for parameter in given:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            if parameter.param_type_name == "argument":  # its name says enough
                parameter.display_type_rich = lambda ctx: None
            if parameter.name == "help":
                parameter.rich_help_panel = self.panel_of_help
        return given

    panel_of_help: str | None = None
    help: str | None

    def format_help(self, context: Any, formatter: Any) -> None:
        """Show it, no wider than one likes to read, every paragraph filled anew, nothing cut."""
        from typer import rich_utils

        from .layout import Folded

        width = min(shutil.get_terminal_size().columns, _WIDEST)
        rich_utils.MAX_WIDTH = width
        rich_utils.Table = Folded  # type: ignore[misc]
        written, self.help = self.help, broken(self.help or "", width - _MARGINS)
        try:
            super().format_help(context, formatter)  # type: ignore[misc]
        finally:
            self.help = written


class Command(_Help, TyperCommand):
    """A command."""

    panel_of_help = "Output"


class Group(_Help, TyperGroup):
    """All of them."""


def command(
    app: typer.Typer,
    name: str,
    *,
    help: str,
    is_quick: bool = False,
    is_shared: bool = False,
    **settings: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Add a function to `app` as the command `name`; one that `is_quick` has no progress to show.

    One that `is_shared` may be started in several processes by a launcher; others would do the
    same several times over.

    Each parameter of the function whose annotation is a dataclass is a group: its fields become the
    command's options, and the function gets an instance. A parameter called `terminal` gets the
    terminal that the options ask for, one called `context` typer's context. All others stay as
    they are.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(function, include_extras=True)
        groups = {n: hint for n, hint in hints.items() if hasattr(hint, "__dataclass_fields__")}
        signature = inspect.signature(function)
        own = [n for n in signature.parameters if n not in groups]
        plain = [n for n in own if n not in ("terminal", "context")]

        @functools.wraps(function)
        def run(context: typer.Context, **values: Any) -> Any:
            if not is_shared:
                check_alone(name)
            output = OutputOptions(**{f.name: values.pop(f.name) for f in fields(OutputOptions)})
            terminal = Terminal(as_json=output.as_json, quiet=output.quiet, debug=output.debug)
            context.obj |= {"debug": output.debug, "command": name}
            context.obj["output"] = values.get("output")
            given = {n: values[n] for n in plain}
            for group, kind in groups.items():
                given[group] = kind(**{f.name: values[f.name] for f in fields(kind)})
            extra = {"terminal": terminal, "context": context}
            try:
                return function(**given, **{n: extra[n] for n in own if n in extra})
            except ValueError as error:  # it names the argument of Python
                error.args = (_as_typed(str(error), context), *error.args[1:])
                raise

        parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
        for parameter in signature.parameters.values():
            if parameter.name in groups:
                parameters += _of_group(groups[parameter.name])
            elif parameter.name in plain:
                hint, default = hints[parameter.name], parameter.default
                parameters.append(_parameter(parameter.name, hint, default))
        # what a command does not read is not offered; scripts may give --quiet to every command
        parameters += _of_group(OutputOptions, hidden={"quiet"} if is_quick else set())
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # or the signature of `function` would be read instead
        app.command(name, cls=Command, help=flowing(help), **settings)(run)
        return function

    return register


def flowing(text: str) -> str:
    """Paragraphs as lines of their own, which any terminal can break; examples as they are."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else " ".join(p.split()) for p in paragraphs)


def _of_group(group: type, hidden: Collection[str] = ()) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    empty = inspect.Parameter.empty
    parameters = []
    for f in fields(group):
        hint, default = hints[f.name], f.default if f.default is not MISSING else empty
        if f.name in hidden:
            option = copy.copy(hint.__metadata__[0])
            option.hidden = True
            hint = Annotated[hint.__origin__, option]
        parameters.append(_parameter(f.name, hint, default))
    return parameters


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _as_typed(message: str, context: typer.Context) -> str:
    """An error message that names options as they are typed: in front, and in backticks."""
    own = {p.name: _flag_of(p) for p in context.command.params}
    own |= {name: own[option] for name, option in _CALLED.items() if option in own}
    message = re.sub("`([a-z_]+)`", lambda name: own.get(name[1], name[0]), message)
    if "model_arg" in own:
        message = message.replace("the model argument ", f"{own['model_arg']} ")
    named = re.match(r"[a-z_]+(, [a-z_]+)*(?=: |=| must )", message)
    if named is None:
        return message
    names = named[0].split(", ")
    if not all(name in own for name in names):
        return message
    return ", ".join(own[name] for name in names) + message[named.end() :]


def _flag_of(parameter: Any) -> str:
    flags = [flag for flag in parameter.opts if flag.startswith("--")]
    return flags[0] if flags else parameter.metavar or parameter.name


def named_of(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of the parameters called `names` that stand on the command line."""
    source = context.get_parameter_source
    return [name for name in names if getattr(source(name), "name", "") == "COMMANDLINE"]


def broken(text: str, width: int) -> str:
    """Examples in lines that are not wider than that, as a shell goes on with them."""
    return "\n".join(
        part
        for line in text.split("\n")
        for part in (_parts(line, width) if line.startswith(" ") else [line])
    )


def _parts(line: str, width: int) -> list[str]:
    """One line of an example in several, each but the last with a backslash at its end."""
    line, goes_on = line.removesuffix(" \\"), line.endswith(" \\")
    parts = []
    while len(line) > width - 2 * goes_on:
        end = _last_gap(line, width - 1)
        if end < 0:  # a word that is wider
            break
        parts.append(line[:end])
        line = " " * _CONTINUED + line[end + 1 :]
    return [f"{part} \\" for part in parts] + [f"{line} \\" if goes_on else line]


def _last_gap(line: str, stop: int) -> int:
    """Where the last space before `stop` is that parts two words for a shell; -1 where none is."""
    indented = len(line) - len(line.lstrip())
    end = line.rfind(" ", indented, stop)
    while end >= 0 and line[:end].count('"') % 2:
        end = line.rfind(" ", indented, end)
    return end
