"""The order of pieces, and processes that do them, end, die, or are stopped."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from spt_kernels.benchmarks import Cell, Place, processes
from spt_kernels.benchmarks.piece import Failure, Piece
from spt_kernels.benchmarks.processes import Processes
from spt_kernels.benchmarks.schedule import InProcess, Report, run_pieces

# Does as a worker does, without what takes long to import
WORKER = """
import json, os, signal, sys, time
print(os.environ["OMP_NUM_THREADS"], file=sys.stderr)
for line in sys.stdin:
    asked = json.loads(line)
    name = asked["piece"]["cell"]["task"]
    print(json.dumps({"note": f"{os.getpid()} on {asked['place']['device']}"}), flush=True)
    if name == "slow":
        time.sleep(1000)
    if name == "dies":
        print("no memory left", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    failure = {"reason": "it cannot be", "trace": "line 3"} if name == "fails" else None
    print(json.dumps({"failure": failure}), flush=True)
    if name == "leaves":
        sys.exit(3)
"""


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_COMMAND", [sys.executable, "-c", WORKER])


def pieces(*tasks: str) -> list[Piece]:
    return [Piece(Cell(task, "linear", seed)) for seed, task in enumerate(tasks)]


def told_of(wanted: list[Piece], devices: list[str], output: Path) -> list[Report]:
    told: list[Report] = []
    with Processes(output, list(map(Place, devices))) as by:
        run_pieces(wanted, by, told.append)
    return told


def test_one_process_does_many_pieces_and_a_new_one_comes_after_a_failure(tmp_path: Path) -> None:
    wanted = pieces("a", "b", "fails", "c", "dies", "d", "leaves", "e")
    told = told_of(wanted, ["cpu"], tmp_path)
    ends = {report.piece.cell.task: report.failure for report in told if not report.note}
    assert list(ends) == ["a", "b", "fails", "c", "dies", "d", "leaves", "e"]
    assert ends["fails"] == Failure("it cannot be", "line 3")
    died = ends["dies"]
    assert died is not None
    assert died.reason == "its process was killed by signal 9, as when memory runs out"
    assert died.trace.endswith("no memory left\n")
    # what a process does when it has nothing to do is no failure of the piece before
    assert [name for name in ("a", "b", "c", "d", "leaves") if ends[name] is not None] == []
    pids = [report.note.split()[0] for report in told if report.note]
    assert pids[0] == pids[1] == pids[2]
    assert len({pids[2], pids[3], pids[5]}) == 3
    assert pids[3] == pids[4]
    assert pids[5] == pids[6]


def test_each_place_has_its_device_and_its_share_of_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # of which a job has some
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    told = told_of(pieces("dies", "dies"), ["cuda:0", "cuda:1"], tmp_path)
    assert {report.note.split()[-1] for report in told if report.note} == {"cuda:0", "cuda:1"}
    failures = [report.failure for report in told if report.failure is not None]
    assert [failure.trace.split()[0] for failure in failures] == ["3", "3"]


def test_a_stop_leaves_no_process(tmp_path: Path) -> None:
    pids: list[int] = []

    def stop(report: Report) -> None:
        pids.append(int(report.note.split()[0]))
        if len(pids) == 2:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path, [Place("cpu")] * 2) as by:
        run_pieces(pieces("slow", "slow", "slow"), by, stop)
    assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert time.monotonic() - began < 100


class Pretended(InProcess):
    """Two at a time; the one that was begun last is over first."""

    n_places = 2

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.begun: list[str] = []
        self.failing = failing
        self.running: deque[Piece] = deque()

    @property
    def is_free(self) -> bool:
        return len(self.running) < self.n_places

    def begin(self, piece: Piece) -> None:
        assert self.is_free
        self.begun.append(piece.cell.task)
        self.running.append(piece)

    def wait(self) -> Report:
        piece = self.running.pop()
        is_bad = piece.cell.task in self.failing
        return Report(piece, failure=Failure("it cannot be", "there") if is_bad else None)


def test_a_piece_waits_for_those_it_needs_and_others_do_not(tmp_path: Path) -> None:
    first, second, other = pieces("first", "second", "other")
    last = Piece(Cell("last", "linear", 9), after=frozenset({first.name, second.name}))
    by = Pretended()
    told: list[Report] = []
    run_pieces([first, second, last, other], by, told.append)
    assert by.begun == ["first", "second", "other", "last"]
    assert all(report.failure is None for report in told)


def test_what_needs_a_failed_piece_fails_with_it_and_is_not_begun(tmp_path: Path) -> None:
    first, other = pieces("first", "other")
    after = Piece(Cell("after", "linear", 9), after=frozenset({first.name}))
    last = Piece(Cell("last", "linear", 9), after=frozenset({after.name}))
    by = Pretended(failing=("first",))
    told: list[Report] = []
    run_pieces([last, after, first, other], by, told.append)
    assert sorted(by.begun) == ["first", "other"]
    reasons = {r.piece.cell.task: r.failure.reason for r in told if r.failure is not None}
    assert reasons["after"] == "first, linear, seed 0: it cannot be"
    assert reasons["last"].endswith("it cannot be")
    assert len(told) == 4
