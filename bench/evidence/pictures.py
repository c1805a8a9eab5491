"""The pictures of a suite's results, as far as they have come: those of `spt_kernels.plots`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from spt_kernels.plots import (
    accuracy_by_budget,
    budget_figure,
    samples_ablation,
    samples_figure,
)
from spt_kernels.plots.runs import SETTINGS, TaskRun

from .contender import Contender, Run, Suite
from .record import Record
from .tasks import GROUPS

Draw = Callable[[], Any]  # makes a figure


def pictures(suite: Suite, records: Mapping[Run, Record]) -> dict[str, Draw]:
    """File name -> what draws it, of those that there are results for.

    Accuracy against what is trained is there when every contender of the tables, and accuracy
    against C when every C, has one seed on all its tasks: a picture of some would mislead.
    """
    # of one method with other scores, a picture shows the method's own
    own = [c for c in suite.contenders if c.scores == "per-sample"]
    main = [c for c in own if not c.is_ablation]
    made: dict[str, Draw] = {}
    if _have_a_seed(suite, records, main, suite.tasks):
        table = accuracy_by_budget(_runs(suite, records, main, suite.tasks), GROUPS)
        made[f"{suite.name}-budget.png"] = partial(budget_figure, table, columns=2)
    by_samples = _by_samples(suite)
    if by_samples and _have_a_seed(suite, records, by_samples, suite.ablation_tasks):
        table = samples_ablation(_runs(suite, records, by_samples, suite.ablation_tasks), GROUPS)
        made[f"{suite.name}-samples.png"] = partial(samples_figure, table)
    return made


def _by_samples(suite: Suite) -> list[Contender]:
    """The contenders that differ in C alone; none if there is but one."""
    of_c = {c.method.name for c in suite.contenders if "C =" in c.name}
    own = [c for c in suite.contenders if c.method.name in of_c and c.scores == "per-sample"]
    return own if len(own) > 1 else []


def _have_a_seed(
    suite: Suite,
    records: Mapping[Run, Record],
    contenders: Iterable[Contender],
    tasks: Sequence[str],
) -> bool:
    return all(
        any(all(Run(task, c.name, seed) in records for task in tasks) for seed in suite.seeds)
        for c in contenders
    )


def _runs(
    suite: Suite,
    records: Mapping[Run, Record],
    contenders: Iterable[Contender],
    tasks: Sequence[str],
) -> list[TaskRun]:
    """As the pictures want them."""
    backbone = max(
        round(r.trained_parameters / r.trained_share) for r in records.values() if r.trained_share
    )
    return [
        TaskRun(
            path=f"{suite.name} {run.task} {run.contender} {run.seed}",
            task=run.task,
            method=contender.method.name,
            settings={name: getattr(contender.method, name) for name in SETTINGS},
            seed=run.seed,
            test_accuracy=record.test_accuracy,
            val_accuracy=None,
            trained=record.trained_parameters,
            structured=None,
            unstructured=None,
            backbone=backbone,
            model=suite.model.name,
            measured_on=contender.method.samples,
        )
        for contender in contenders
        for run, record in records.items()
        if run.contender == contender.name and run.task in tasks
    ]
