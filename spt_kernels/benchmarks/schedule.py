"""Which piece is done when and where: in this process, or whatever else can begin one and wait."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..finetuning.progress import Silent
from .cell import Place
from .piece import Failure, Piece, do_piece


@dataclass(frozen=True)
class Report:
    """What is told of a piece.

    Attributes:
        piece: which one.
        note: where it is; empty when it is over.
        failure: why it could not be done; with no note, `None` says that it is done.
    """

    piece: Piece
    note: str = ""
    failure: Failure | None = None


class Workers(Protocol):
    """Something that does pieces; leaving the context stops whatever is under way at once."""

    def __enter__(self) -> Workers:
        """Get ready."""

    def __exit__(self, *error: object) -> None:
        """Stop all; a piece that is stopped can be gone on with later."""

    @property
    def is_free(self) -> bool:
        """Whether another piece can begin now."""

    @property
    def n_places(self) -> int:
        """How many can be under way at once."""

    def begin(self, piece: Piece) -> None:
        """Begin a piece; only when there `is_free` place."""

    def wait(self) -> Report:
        """The next thing that is told of any piece under way."""


class InProcess(contextlib.AbstractContextManager["InProcess"]):
    """Does one piece after the other in this process."""

    n_places = 1

    def __init__(self, output: Path, place: Place) -> None:
        self._output, self._place = output, place
        self._told: deque[Report] = deque()

    def __exit__(self, *error: object) -> None:
        """Nothing is under way."""

    @property
    def is_free(self) -> bool:
        """Whether what came of the last piece has been told."""
        return not self._told

    def begin(self, piece: Piece) -> None:
        """Do it."""
        failure = do_piece(self._output, piece, self._place, Silent())
        self._told.append(Report(piece, failure=failure))

    def wait(self) -> Report:
        """What came of it."""
        return self._told.popleft()


def run_pieces(
    pieces: Sequence[Piece],
    workers: Workers,
    told: Callable[[Report], None] = lambda _: None,
) -> None:
    """Do all pieces, each after those it needs; what needs one that failed fails with it.

    Args:
        pieces: in the order in which they are begun.
        workers: who does them, entered already.
        told: called with each report.
    """
    waiting = list(pieces)
    under_way: set[str] = set()
    failed: dict[str, Failure] = {}
    open_names = {piece.name for piece in waiting}
    while waiting or under_way:
        for piece in list(waiting):
            lost = sorted(piece.after & failed.keys())
            if lost:
                waiting.remove(piece)
                reason = f"{lost[0]}: {failed[lost[0]].reason}"
                failed[piece.name] = Failure(reason, failed[lost[0]].trace)
                open_names.discard(piece.name)
                told(Report(piece, failure=failed[piece.name]))
            elif workers.is_free and not piece.after & open_names:
                waiting.remove(piece)
                under_way.add(piece.name)
                workers.begin(piece)
        if not under_way:
            continue
        report = workers.wait()
        if not report.note:
            under_way.discard(report.piece.name)
            open_names.discard(report.piece.name)
            if report.failure is not None:
                failed[report.piece.name] = report.failure
        told(report)
