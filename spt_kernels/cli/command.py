"""How a function that takes groups of options becomes a command with a flat list of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import typer

from .options import OutputOptions
from .terminal import Terminal


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """Add a function to `app` as the command `name`.

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
            output = OutputOptions(**{f.name: values.pop(f.name) for f in fields(OutputOptions)})
            terminal = Terminal(as_json=output.as_json, quiet=output.quiet, debug=output.debug)
            context.obj["debug"] = output.debug
            given = {n: values[n] for n in plain}
            for group, kind in groups.items():
                given[group] = kind(**{f.name: values[f.name] for f in fields(kind)})
            extra = {"terminal": terminal, "context": context}
            return function(**given, **{n: extra[n] for n in own if n in extra})

        parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
        for parameter in signature.parameters.values():
            if parameter.name in groups:
                parameters += _of_group(groups[parameter.name])
            elif parameter.name in plain:
                hint, default = hints[parameter.name], parameter.default
                parameters.append(_parameter(parameter.name, hint, default))
        parameters += _of_group(OutputOptions)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # or the signature of `function` would be read instead
        app.command(name, **settings)(run)
        return function

    return register


def _of_group(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    empty = inspect.Parameter.empty
    return [
        _parameter(f.name, hints[f.name], f.default if f.default is not MISSING else empty)
        for f in fields(group)
    ]


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def named_of(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of the parameters called `names` that stand on the command line."""
    source = context.get_parameter_source
    return [name for name in names if getattr(source(name), "name", "") == "COMMANDLINE"]
