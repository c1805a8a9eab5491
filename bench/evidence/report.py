"""Writes docs/evidence.md and its pictures from the results: `python -m bench.evidence.report`.

`--check` fails where the page is not what the results say. Nothing in it is typed in: every number
and every verdict comes from `bench/results/evidence`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spt_kernels.benchmarks import BenchmarkTable, BenchmarkTask
from spt_kernels.benchmarks.table import BenchmarkRow, mean_of
from spt_kernels.benchmarks.table_text import NOTHING, figure_text, group_grid, notes, task_grid
from spt_kernels.files.atomic import write_atomically
from spt_kernels.files.picture import save_picture
from spt_kernels.finetuning import ImageSource

from ..markdown import markdown
from .analysis import MIN_PAIRS, MIN_SEEDS, Comparison, compare, figure, mean_figure
from .contender import Contender, Run, Suite
from .pictures import pictures
from .record import FOLDER, Record, path_of, read
from .setting import SUITES
from .tasks import GROUPS, SOURCES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
PICTURES = ROOT / "docs" / "evidence"

_INTRODUCTION = """# Evidence

Does sensitivity-aware tuning do here what its paper says? Real photographs, tasks of the three
kinds of VTAB-1k, every method at one budget, and paired tests. `make evidence` runs what is missing
and writes this page from the results in `bench/results/evidence`; nothing in it is typed in. The
setting is [bench/evidence/setting.py](../bench/evidence/setting.py), fixed before the first run
that counts.
"""

_METHOD = f"""## How the questions are answered

Two contenders are compared on pairs of one task and one seed: the same images, the same order, the
same start of the head. A difference is in points of test accuracy. Its interval is Student's of
95 %; p is of Wilcoxon's signed-rank test, two-sided, corrected by Holm over the questions of a
suite. *Better* and *worse* are said below p = 0.05, else that no difference is shown. Whether
structured modules help most on a group is asked seed by seed, by Student's t: the mean difference
on its tasks less that on the others. *Enough* is said where the whole interval is above the margin.
With fewer than {MIN_PAIRS} pairs, or {MIN_SEEDS} seeds, a question is open, and an answer of fewer
pairs than planned is one *so far*; the correction counts open questions as well. Pairs of one task
share its test images, so that an interval is about these tasks, not about all there could be.
"""

_AGAIN = f"""## To run it again

```sh
SPT_EVIDENCE_DATA=FOLDER make evidence       # two processes on the CPU; hours
python -m bench.evidence.run --device cuda   # or on a card; --seeds 1 for the first seed alone
python -m bench.evidence.report              # this page, of as many results as there are
```

A run can be stopped at any moment and called again. FOLDER (without it, `../shared/data` beside the
repository) holds `vit_cifar6.safetensors`, the ViT's weights, and the photographs:

{chr(10).join(f"- `{name}`: {what}" for name, what in SOURCES.items())}
"""

_SAID = {
    "better": "Yes: {ours} is better than {theirs} by {size} points",
    "worse": "No: {ours} is worse than {theirs} by {size} points",
    "no difference": "No difference is shown between {ours} and {theirs}: {mean} points",
    "enough": "Yes: {ours} is less than {margin} points below {theirs}: {mean} points",
    "not enough": "No: {ours} is more than {margin} points below {theirs}: {mean} points",
    "undecided": "Undecided: {ours} may be more than {margin} points below {theirs}: {mean} points",
}
_SAID_OF_GROUP = {
    "better": "Yes: what {ours} gains over {theirs} is larger on the {group} tasks, by {size} "
    "points",
    "worse": "No: what {ours} gains over {theirs} is smaller on the {group} tasks, by {size} "
    "points",
    "no difference": "No difference is shown between what {ours} gains over {theirs} on the "
    "{group} tasks and on the others: {mean} points",
}


def answer(made: Comparison) -> str:
    """A question's answer in one sentence."""
    own = made.hypothesis
    there = f"{len(made.differences)} of {made.n_planned}"
    unit = "pairs" if own.group is None else "seeds"
    if made.verdict == "open" or made.mean is None or made.interval is None:
        so_far = "" if made.mean is None else f", with a mean difference of {made.mean:+.2f} points"
        return f"Open: {there} {unit} are there{so_far}."
    said = (_SAID if own.group is None else _SAID_OF_GROUP)[made.verdict].format(
        ours=f"`{own.ours}`",
        theirs=f"`{own.theirs}`",
        size=f"{abs(made.mean):.2f}",
        mean=f"{made.mean:+.2f}",
        margin=own.margin,
        group=own.group,
    )
    low, high = made.interval
    facts = [f"95 % interval {low:+.2f} to {high:+.2f}"]
    if made.adjusted is not None:
        p = _p(made.adjusted)
        facts.append(f"p {p}" if p.startswith("<") else f"p = {p}")
    is_whole = len(made.differences) == made.n_planned
    facts.append(f"{made.n_planned if is_whole else there} {unit}")
    return f"{'' if is_whole else 'So far: '}{said} ({'; '.join(facts)})."


def suite_text(suite: Suite, records: Mapping[Run, Record], drawn: Sequence[str]) -> str:
    """All of a suite: its answers, tables, pictures and setting."""
    accuracies = {run: record.test_accuracy for run, record in records.items()}
    done, planned = len(records), len(suite.runs())
    comparisons = compare(suite, accuracies, GROUPS)
    parts = [f"## {suite.title}"]
    if done < planned:
        parts.append(f"**Not complete: {done} of {planned} runs are there.**")
    parts.append("\n".join(f"- *{c.hypothesis.question}* {answer(c)}" for c in comparisons))
    every = [c for c in suite.contenders if not c.is_ablation]
    table = table_of(suite, records, every, suite.tasks)
    if len(suite.tasks) == 1:
        parts += [f"### Accuracy on `{suite.tasks[0]}`", _by_group(table)]
    else:
        parts += ["### Accuracy by group, as the paper's Table 1", _by_group(table)]
        parts += ["### Accuracy by task, as its Table 10", task_grid(table).markdown()]
    parts.append("\n".join(f"- {line}" for line in notes(table)))
    ablations = [c for c in suite.contenders if c.is_ablation]
    if ablations:
        beside = {name for h in suite.hypotheses for name in (h.ours, h.theirs)}
        of_methods = {c.method.name for c in ablations}
        rows = [c for c in every if c.name in beside and c.method.name in of_methods]
        own = table_of(suite, records, [*rows, *ablations], suite.ablation_tasks)
        parts += ["### Ablations", _by_task(own)]
    parts += [f"![{Path(name).stem}](evidence/{name})" for name in drawn]
    parts += ["### Differences", _differences(comparisons)]
    parts += ["### Setting", "\n".join(f"- {line}" for line in suite.notes)]
    parts.append(_effort(records.values()))
    return "\n\n".join(part for part in parts if part) + "\n"


def table_of(
    suite: Suite,
    records: Mapping[Run, Record],
    contenders: Sequence[Contender],
    tasks: Sequence[str],
) -> BenchmarkTable:
    """The runs of some contenders and tasks as the table of a benchmark."""
    accuracies = {run: record.test_accuracy for run, record in records.items()}
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(GROUPS[task], []).append(task)
    rows = []
    for contender in contenders:
        name = contender.name
        means = {g: mean_figure(suite, accuracies, name, own) for g, own in groups.items()}
        mine = [r for run, r in records.items() if run.contender == name and run.task in tasks]
        rows.append(
            BenchmarkRow(
                name,
                round(statistics.fmean(r.trained_parameters for r in mine)) if mine else None,
                statistics.fmean(r.trained_share for r in mine) if mine else None,
                {task: figure(suite, accuracies, name, task) for task in tasks},
                means,
                mean_of(means.values(), suite.seeds),
                {},
            )
        )
    named = {contender.name for contender in contenders}
    there = [r for run, r in records.items() if run.contender in named and run.task in tasks]
    return BenchmarkTable(
        suite.title,
        suite.model.name,
        tuple(_task(task) for group in groups.values() for task in group),
        suite.seeds,
        tuple(rows),
        {},
        len(contenders) * len(tasks) * len(suite.seeds) - len(there),
        sum(record.seconds for record in there),
        tuple(dict.fromkeys(map(_machine, there))),
    )


def _by_group(table: BenchmarkTable) -> str:
    """With every parameter counted: a hundredth of a million is a third of what is trained here."""
    grid = group_grid(table)
    place = grid.columns.index("trained")
    counts = [row.trained_parameters for row in table.rows]
    cells = [list(row) for row in grid.rows]
    for row, count in zip(cells, counts, strict=True):
        row[place] = NOTHING if count is None else f"{count:,}"
    return replace(grid, rows=tuple(map(tuple, cells))).markdown()


def _by_task(table: BenchmarkTable) -> str:
    """Of one task of each group, whose mean says nothing more."""
    names = [task.name for task in table.tasks]
    rows = [
        (row.method, *(figure_text(row.tasks[name]) for name in names), figure_text(row.mean))
        for row in table.rows
    ]
    return markdown(("method", *names, "mean"), rows)


def _task(name: str) -> BenchmarkTask:
    source = ImageSource(name)
    return BenchmarkTask(name, name, GROUPS[name], source, source)


def _machine(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    threads = "1 thread" if record.threads == 1 else f"{record.threads} threads"
    return f"{record.machine}, {threads}, {versions}"


def _differences(comparisons: Sequence[Comparison]) -> str:
    """The numbers of the answers."""
    rows = []
    for made in comparisons:
        own, interval = made.hypothesis, made.interval
        what = f"{own.ours} − {own.theirs}"
        rows.append(
            (
                what if own.group is None else f"{what}, {own.group} − others",
                f"{len(made.differences)} of {made.n_planned}",
                "–" if made.mean is None else f"{made.mean:+.2f}",
                "–" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}",
                "–" if made.p is None else _p(made.p),
                "–" if made.adjusted is None else _p(made.adjusted),
            )
        )
    return markdown(("points", "pairs", "mean", "95 % interval", "p", "p, Holm"), rows)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _effort(records: Iterable[Record]) -> str:
    every = list(records)
    if not every:
        return ""
    hours = sum(record.cpu_seconds for record in every) / 3600
    commits = ", ".join(dict.fromkeys(record.commit for record in every if record.commit))
    return f"{len(every)} runs in {hours:.1f} hours of one core, at commit {commits}."


def page(found: Mapping[str, Mapping[Run, Record]], drawn: Mapping[str, Sequence[str]]) -> str:
    """The whole of docs/evidence.md."""
    suites = [suite_text(SUITES[n], records, drawn.get(n, ())) for n, records in found.items()]
    return "\n".join([_INTRODUCTION, *suites, _METHOD, _AGAIN])


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    parser.add_argument("--results", type=Path, default=FOLDER, help="the files of results")
    given = parser.parse_args()
    try:
        found = {n: read(suite, path_of(suite, given.results)) for n, suite in SUITES.items()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    made = {n: pictures(suite, found[n]) for n, suite in SUITES.items()}
    text = page(found, {n: tuple(own) for n, own in made.items()})
    if given.check:
        if not PAGE.is_file() or PAGE.read_text() != text:
            print("docs/evidence.md is not what the results say: make evidence", file=sys.stderr)
            return 1
        return 0
    PICTURES.mkdir(parents=True, exist_ok=True)
    for own in made.values():
        for name, draw in own.items():
            save_picture(draw(), PICTURES / name)
    write_atomically(PAGE, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
