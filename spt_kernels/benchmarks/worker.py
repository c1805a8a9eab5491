"""A process that does pieces of a benchmark as they are asked for, and ends with who asks."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TextIO

from ..finetuning.progress import Silent
from .cell import Place
from .piece import Piece, do_piece

_NOTE_SECONDS = 1.0  # between two notes


class Noted(Silent):
    """Tells where a run is, now and then."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._stage, self._total, self._done = "", 0, 0
        self._last = 0.0

    def start(self, stage: str, total: int) -> None:
        """A stage begins."""
        self._stage, self._total, self._done = stage, total, 0
        self.advance(0)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """It goes on."""
        self._done += steps
        if time.monotonic() - self._last >= _NOTE_SECONDS:
            self._last = time.monotonic()
            share = 100 * self._done // max(1, self._total)
            self._say(f"{self._stage} {share} %")


def main() -> None:
    """Read lines of `{"output", "piece", "place"}`; write notes and an end, as JSON, for each."""
    # what libraries print must not come between the lines
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_hear, args=(asked,), daemon=True).start()
        while True:
            _answer(json.loads(asked.get()), out)


def _hear(asked: queue.SimpleQueue[str]) -> None:
    """Pass on each line; when there are no more, who asks is gone, and nobody wants the rest."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _answer(asked: dict[str, Any], out: TextIO) -> None:
    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    place, piece = Place(**asked["place"]), Piece.from_json(asked["piece"])
    progress = Noted(lambda text: say({"note": text}))
    failure = do_piece(asked["output"], piece, place, progress)
    say({"failure": None if failure is None else asdict(failure)})


if __name__ == "__main__":
    main()
