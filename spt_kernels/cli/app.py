"""The commands of `spt-kernels` in one app, and what becomes of an error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import (
    BaseModelMismatch,
    DeltaFormatError,
    MissingExtra,
    OtherProcessFailed,
    is_out_of_memory,
)
from . import (
    bench,
    benchmark,
    compare,
    demo,
    evaluate,
    finetune,
    fit,
    inspect,
    memory,
    merge,
    plan,
    plot,
    predict,
    segment,
    sensitivity,
)
from .command import Group, command, flowing
from .launched import launched

USER_ERROR = 2
INTERRUPTED = 130

# What a user can cause and mend: a bad argument, file, image or model. Anything else is our mistake
# and keeps its traceback.
_USER_ERRORS = (
    *(ValueError, OSError, FloatingPointError),
    *(BaseModelMismatch, DeltaFormatError, MissingExtra),
)
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # typer does not name it

# A launcher ends all processes as soon as one is gone: the one that knows why is to say so first
_LET_SPEAK_SECONDS = 1.0

_SHARED = ("finetune",)  # torchrun may start them
_QUICK = ("plan", "inspect", "compare", "plot", "merge")  # they have no progress to show

_RESUMED = ("finetune", "segment")

_HELP = """Adapt a pre-trained vision model with under 1 % of its parameters.

[bold]A first look[/], two minutes, no GPU, no download:

  spt-kernels demo

[bold]Your own images[/], in train/<class>/ and test/<class>/:

  spt-kernels finetune -m vit_base_patch16_224 --pretrained \\
      -d photos -o runs/photos

[bold]What is in a file[/], and what it does to the model:

  spt-kernels inspect runs/photos/task.safetensors
  spt-kernels evaluate runs/photos
  spt-kernels predict runs/photos new-photos
  spt-kernels merge runs/photos -o merged.safetensors

Every command has --json for machines, and --help with examples.
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    It is 0, 2 for what the user can mend, 130 for Ctrl-C, or 1 where a command has done what was
    asked for and the answer is no.
    """
    state: dict[str, Any] = {"debug": "--debug" in (sys.argv if arguments is None else arguments)}
    given = None if arguments is None else list(arguments)
    try:
        app = make_app()
        code = app(given, standalone_mode=False, prog_name="spt-kernels", obj=state)
        if code == INTERRUPTED:  # what newer versions of typer make of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        if launched()[0]:  # the first process says it
            return INTERRUPTED
        return _complain(_stopped(state.get("command"), state.get("output")), INTERRUPTED)
    except _USAGE_ERROR as error:
        if state["debug"]:
            raise
        if launched()[0]:  # the first process says the same
            time.sleep(_LET_SPEAK_SECONDS)
            return USER_ERROR
        problem = error.format_message()
        if not problem:  # of no arguments at all, for which the help was shown
            return USER_ERROR
        return _complain(f"{problem} (--help shows the options)", USER_ERROR)
    except OtherProcessFailed:
        if state["debug"]:
            raise
        time.sleep(_LET_SPEAK_SECONDS)
        return USER_ERROR  # the one that failed says why
    except _USER_ERRORS as error:
        if state["debug"]:
            raise
        return _complain(_one_line(error), USER_ERROR)
    except RuntimeError as error:
        if state["debug"] or not is_out_of_memory(error):
            raise
        return _complain(_out_of_memory(state.get("command", "")), USER_ERROR)


def make_app() -> typer.Typer:
    """The app with all its commands."""
    app = typer.Typer(cls=Group, help=flowing(_HELP), rich_markup_mode="rich", no_args_is_help=True)

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option(
                "--version", help="Show the version.", is_eager=True, callback=_show_version
            ),
        ] = False,
    ) -> None:
        pass

    for name, module in (
        ("demo", demo),
        ("finetune", finetune),
        ("segment", segment),
        ("sensitivity", sensitivity),
        ("plan", plan),
        ("memory", memory),
        ("fit", fit),
        ("inspect", inspect),
        ("evaluate", evaluate),
        ("predict", predict),
        ("compare", compare),
        ("plot", plot),
        ("merge", merge),
        ("benchmark", benchmark),
        ("bench", bench),
    ):
        about = {"is_quick": name in _QUICK, "is_shared": name in _SHARED}
        command(app, name, **about, help=module.HELP)(module.run)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def _stopped(command: str | None, output: Path | None) -> str:
    """What to say of a Ctrl-C: what is not lost."""
    if command == "benchmark":
        return "stopped; the same command goes on"
    if command not in _RESUMED or output is None:
        return "stopped"
    from ..finetuning.folder.run_folder import FILES

    if not (output / FILES["config"]).is_file():
        return "stopped before the run had begun; the same command starts it"
    return "stopped; --resume goes on with the run"


def _complain(message: str, code: int) -> int:
    rank, _ = launched()
    where = f"process {rank}: " if rank else ""
    print(f"spt-kernels: {where}{message}", file=sys.stderr)
    return code


def _out_of_memory(command: str) -> str:
    # some can go on with the same batch
    if command == "finetune":
        return (
            "out of memory: try --memory SIZE, --resume goes on with it, or --force with --amp bf16"
        )
    if command == "segment":
        return (
            "out of memory: try --recompute block, --resume goes on with it, or --force with a "
            "smaller --batch-size or --amp bf16"
        )
    return "out of memory: try a smaller --batch-size, or --amp bf16"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ")  # a list has its own line for each
