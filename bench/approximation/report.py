"""The tables of docs/APPROXIMATE.md, made of the committed results."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.markdown import markdown
from bench.report import rendered

from .accuracy import CONTENDER, EPOCHS, read
from .ways import EXACT, GRADIENTS, MEMORY, WAYS

PAGE = Path(__file__).parents[2] / "docs" / "APPROXIMATE.md"
_TITLES = {"four-classes": "four classes", "rotation": "rotation"}


def memory_table() -> str:
    """GiB of a training step, and its ratio to the exact one."""
    told = json.loads(MEMORY.read_text())
    peaks = {(row["method"], row["dtype"], row["way"]): row["peak_bytes"] for row in told["rows"]}
    rows = []
    for method, dtype in dict.fromkeys((method, dtype) for method, dtype, _ in peaks):
        exact = peaks[method, dtype, EXACT]
        cells = [_size(peaks[method, dtype, way], None if way == EXACT else exact) for way in WAYS]
        rows.append((f"{method}, {dtype}", *cells))
    return markdown((f"GiB, batch {told['batch']}", *WAYS), rows)


def _size(n_bytes: int, exact: int | None) -> str:
    share = "" if exact is None else f" ({n_bytes / exact:.2f})"
    return f"{n_bytes / 2**30:.2f}{share}"


def gradient_table() -> str:
    """Errors of gradients and of derivatives by block, in percent."""
    told = json.loads(GRADIENTS.read_text())
    rows = [
        (f"{what}, {way}", *(f"{100 * error:.2g}" for error in errors))
        for what, part in (("gradient", "gradients"), ("derivative", "derivatives"))
        for way, errors in told[part].items()
    ]
    depth = len(rows[0]) - 1
    blocks = [f"block {block + 1}" for block in range(depth)]
    return (
        f"{markdown(('error in %', *blocks), rows)}\n\n"
        f"Of {told['images']} training images of the task `{told['task']}`, before any training; "
        f"{_machine(told['machine'], told['versions'], told['commit'])}."
    )


def accuracy_table() -> str:
    """Test accuracies over the seeds, and the differences from the exact runs of the same seeds."""
    runs = {(run.task, run.way, run.seed): run for run in read()}
    tasks, ways = dict.fromkeys(t for t, _, _ in runs), {w for _, w, _ in runs}

    def values(task: str, way: str) -> dict[int, float]:
        return {
            s: 100 * run.test_accuracy for (t, w, s), run in runs.items() if (t, w) == (task, way)
        }

    def cells(way: str) -> Iterator[str]:
        differences: list[float] = []
        for task in tasks:
            own, exact = values(task, way), values(task, EXACT)
            differences += [own[seed] - exact[seed] for seed in own.keys() & exact.keys()]
            yield f"{_spread(list(own.values()))} ({len(own)})" if own else ""
        yield "" if way == EXACT else _mean_and_error(differences)

    commits: dict[tuple[str, ...], list[str]] = {}  # of each machine and its versions
    for run in runs.values():
        commits.setdefault((run.machine, *map(" ".join, run.versions.items())), []).append(
            run.commit
        )
    where = "; ".join(
        f"{len(of_one)} on {', '.join(told)}, commits {', '.join(dict.fromkeys(of_one))}"
        for told, of_one in commits.items()
    )
    titles = [f"{_TITLES[task]}, %" for task in tasks]
    rows = [(way, *cells(way)) for way in WAYS if way in ways]
    return (
        f"{markdown(('', *titles, 'minus exact, points'), rows)}\n\n"
        f"Mean ± standard deviation of `{CONTENDER}` after {EPOCHS} epochs, in brackets over how "
        "many seeds; the differences are of pairs of one task and seed, with their standard error. "
        f"{len(runs)} runs, one thread each: {where}."
    )


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _mean_and_error(differences: Sequence[float]) -> str:
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {error:.2f} ({len(differences)})"


def _machine(processor: str, versions: Mapping[str, str], commit: str) -> str:
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{processor}, one thread; {told}, commit {commit}"


TABLES: Mapping[str, Callable[[], str]] = {
    "memory": memory_table,
    "gradients": gradient_table,
    "accuracy": accuracy_table,
}


def write(only_check: bool = False) -> int:
    """Put the tables into the page; with `only_check` say whether they are what it has."""
    text = PAGE.read_text()
    new = rendered(text, TABLES)
    if only_check:
        if new != text:
            print(f"{PAGE.name} is not what the results say", file=sys.stderr)
        return int(new != text)
    PAGE.write_text(new)
    return 0
