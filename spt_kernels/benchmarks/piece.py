"""The pieces of work that a benchmark falls into, each of which a process or a node can do."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from ..files.json_file import read_object
from ..finetuning.progress import Progress
from .candidates import Options, candidates_of, named
from .cell import Cell, CellResult, Place, is_chosen, run_candidate, run_cell, tidy
from .setting import BenchmarkSetting

SETTING = "benchmark.json"


@dataclass(frozen=True)
class Piece:
    """A candidate of a choice to train, or a cell to run.

    Attributes:
        cell: which one; of a candidate, the one of the first seed.
        options: those of the candidate, `None` for the cell itself.
        after: names of the pieces that must be done before.
    """

    cell: Cell
    options: Options | None = None
    after: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """As `caltech101, spt-lora, seed 0` or `caltech101, spt-lora with lr=0.001`."""
        own = f"{self.cell.task}, {self.cell.method}"
        if self.options is None:
            return f"{own}, seed {self.cell.seed}"
        return f"{own} with {named(self.options)}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, `after` left out."""
        return {"cell": asdict(self.cell), "options": self.options}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Piece:
        """Read what `to_json` wrote."""
        return cls(Cell(**value["cell"]), value["options"])


@dataclass(frozen=True)
class Failure:
    """Why a piece could not be done.

    Attributes:
        reason: one line.
        trace: where it happened, for the one who mends it; empty if unknown.
    """

    reason: str
    trace: str = ""


def cells_of(setting: BenchmarkSetting) -> list[Cell]:
    """All of them, a method's after the other's, so that rows of the table are filled in turn.

    Side by side there are then runs that do not wait for one another's sensitivity.
    """
    return [
        Cell(task.name, method.name, seed)
        for method in setting.methods
        for seed in setting.seeds
        for task in setting.tasks
    ]


def unfinished(setting: BenchmarkSetting, output: Path, wanted: list[Cell]) -> list[Piece]:
    """What there is to do for the cells that are wanted, in an order in which it can be done.

    Those that are finished are tidied up, if a kill came between.
    """
    pieces: dict[str, Piece] = {}
    for cell in wanted:
        if CellResult.read(output, cell) is not None:
            tidy(output, cell)
            continue
        tried: list[Piece] = []
        if not is_chosen(output, cell):
            first = Cell(cell.task, cell.method, setting.seeds[0])
            options = candidates_of(setting.choices, setting.method(cell.method))
            tried = [Piece(first, own) for own in options]
        last = Piece(cell, None, frozenset(piece.name for piece in tried))
        pieces |= {piece.name: piece for piece in (*tried, last)}
    return list(pieces.values())


def do_piece(
    output: str | os.PathLike[str], piece: Piece, place: Place, progress: Progress | None = None
) -> Failure | None:
    """Do a piece of the benchmark in `output`; return why it could not be done, if it could not."""
    try:
        setting = read_setting(output)
        if piece.options is None:
            run_cell(setting, piece.cell, output, place, progress)
        else:
            run_candidate(setting, piece.cell, piece.options, output, place, progress)
    except Exception as error:  # whatever it is, it is told in the table, and others go on
        return Failure(_one_line(error), traceback.format_exc())
    return None


def read_setting(output: str | os.PathLike[str]) -> BenchmarkSetting:
    """The setting of the benchmark in a folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = Path(output) / SETTING
    if not path.is_file():
        raise ValueError(f"no benchmark in {output} ({SETTING} is not there)")
    value = read_object(path).plain()
    try:
        return BenchmarkSetting.from_json(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not of this version ({error!r})") from error


def write_setting(output: Path, setting: BenchmarkSetting) -> None:
    """Keep it in the benchmark's folder."""
    text = json.dumps(setting.to_json(), indent=2) + "\n"
    write_atomically(output / SETTING, text.encode())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # what a user can mend says all by itself
    is_clear = isinstance(error, (ValueError, FloatingPointError)) and text
    return text if is_clear else f"{type(error).__name__}: {text}".rstrip(": ")
