"""Worker processes on this machine: one for each device, or several, each with its own threads."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..finetuning.device import own_cores
from .cell import Place
from .piece import Failure, Piece
from .schedule import Report

_COMMAND = [sys.executable, "-m", f"{__package__}.worker"]
_LAST_LINES = 12  # of what a process that died wrote, to be kept


class Processes(contextlib.AbstractContextManager["Processes"]):
    """A process for each place, fresh ones that share nothing with this one or with each other.

    A process does many pieces, as it takes seconds to start; after one that failed the next piece
    gets a new process, for what an error leaves on a card harms those that come after.
    """

    def __init__(self, output: Path, places: Sequence[Place]) -> None:
        """Start nothing yet.

        Args:
            output: the folder of the benchmark.
            places: one for each process.
        """
        self.n_places = len(places)
        self._output, self._places = output, places
        self._processes: dict[int, _Process] = {}  # by the number of its place
        self._under_way: dict[int, Piece] = {}  # likewise
        self._told: queue.SimpleQueue[tuple[_Process, dict[str, Any]]] = queue.SimpleQueue()

    def __exit__(self, *error: object) -> None:
        """End every process at once."""
        for process in self._processes.values():
            process.end()
        self._processes.clear()
        self._under_way.clear()

    @property
    def is_free(self) -> bool:
        """Whether a place has nothing to do."""
        return len(self._under_way) < self.n_places

    def begin(self, piece: Piece) -> None:
        """Give it to a place that has nothing to do."""
        number = next(n for n in range(self.n_places) if n not in self._under_way)
        if number not in self._processes:
            threads = max(1, own_cores() // self.n_places)
            self._processes[number] = _Process(number, threads, self._told)
        self._under_way[number] = piece
        self._processes[number].give(self._output, piece, self._places[number])

    def wait(self) -> Report:
        """What the next process says, or how it died."""
        while True:
            process, said = self._told.get()
            if self._processes.get(process.number) is not process:
                continue  # the last word of one that has been ended
            if "note" in said:
                return Report(self._under_way[process.number], said["note"])
            if said["failure"] is not None:
                self._processes.pop(process.number).end()
            piece = self._under_way.pop(process.number, None)
            if piece is not None:  # else it died while it had nothing to do
                failure = said["failure"]
                return Report(piece, failure=None if failure is None else Failure(**failure))


class _Process:
    """A process and the threads that listen to it."""

    def __init__(self, number: int, threads: int, told: queue.SimpleQueue[Any]) -> None:
        self.number, self._told = number, told
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        # one's own setting stands; a session of its own, so that Ctrl-C is this process's to answer
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",  # whatever a library writes
            env=environment,
            start_new_session=True,
        )
        self._listening = [
            threading.Thread(target=target, daemon=True) for target in (self._listen, self._keep)
        ]
        for thread in self._listening:
            thread.start()

    def give(self, output: Path, piece: Piece, place: Place) -> None:
        """Send it a piece."""
        asked = {"output": str(output), "piece": piece.to_json(), "place": asdict(place)}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which the listener tells
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Kill it, and the processes that it has started; a run bears that at any moment."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._listening:
            thread.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._told.put((self, json.loads(line)))
        self._told.put((self, {"failure": self._death()}))

    def _keep(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)

    def _death(self) -> dict[str, str]:
        code = self._process.wait()
        self._listening[1].join()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        more = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return {"reason": f"its process {how}{more}", "trace": "".join(self._errors)}
