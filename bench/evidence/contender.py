"""What is compared: a method, the scores that it chooses by, and the question that two answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from spt_kernels.finetuning import ModelSource, Recipe
from spt_kernels.methods import Method

from .tasks import SEED, SIDE

SCORES = ("per-sample", "batch-squared", "random", "magnitude")


@dataclass(frozen=True)
class Contender:
    """A row of the tables.

    Attributes:
        name: as tables and results have it.
        method: what is trained.
        scores: what a sensitivity-aware method chooses by, one of `SCORES`.
        is_ablation: whether it runs on the suite's ablation tasks alone.
    """

    name: str
    method: Method
    scores: str = "per-sample"
    is_ablation: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """A question that the difference of two contenders answers, over pairs of one task and seed.

    Attributes:
        question: as the report asks it.
        ours: name of the contender that is to be better.
        theirs: name of the other.
        margin: None where the question is whether ours is better. Else whether ours is enough: no
            more than so many points below the other.
        group: the question is then whether the difference is larger on this group's tasks than on
            the others.
    """

    question: str
    ours: str
    theirs: str
    margin: float | None = None
    group: str | None = None


@dataclass(frozen=True)
class Suite:
    """A base model, and all that is run on it.

    Attributes:
        name: of the file of its results.
        title: a heading.
        model: its `weights` is the name of a file in the data folder.
        recipe: how all are trained; its seed is not read.
        form: fields of `Preprocessing`.
        tasks: names of folders.
        ablation_tasks: those of the ablations.
        seeds: of each contender and task.
        contenders: rows of the tables.
        hypotheses: in the order of the report; one family for Holm's correction.
        notes: what is not as in the paper, and why.
    """

    name: str
    title: str
    model: ModelSource
    recipe: Recipe
    form: Mapping[str, Any]
    tasks: tuple[str, ...]
    ablation_tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    contenders: tuple[Contender, ...]
    hypotheses: tuple[Hypothesis, ...]
    notes: tuple[str, ...] = field(default=())

    def contender(self, name: str) -> Contender:
        """The one of that name."""
        return next(own for own in self.contenders if own.name == name)

    def tasks_of(self, contender: Contender) -> tuple[str, ...]:
        """Those that it runs on."""
        return self.ablation_tasks if contender.is_ablation else self.tasks

    def runs(self) -> list[Run]:
        """Every run: first what the questions need, all of one seed before the next, then the rest.

        So what is there can be told at any moment, and answers the most.
        """
        asked = {name for own in self.hypotheses for name in (own.ours, own.theirs)}
        return [
            Run(task, contender.name, seed)
            for is_asked in (True, False)
            for seed in self.seeds
            for contender in self.contenders
            if (contender.name in asked) == is_asked
            for task in self.tasks_of(contender)
        ]

    def digest_of(self, name: str) -> str:
        """Of all that the runs of one contender depend on, as far as it is not a default."""
        own = self.contender(name)
        shared = {key: getattr(self, key) for key in ("model", "recipe", "form")}
        shared["tasks"] = (SEED, SIDE)
        text = json.dumps(_told({**shared, "method": own.method, "scores": own.scores}))
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Run:
    """One training, by the names that its suite knows."""

    task: str
    contender: str
    seed: int

    @property
    def folder(self) -> str:
        """A name for a folder."""
        return f"{self.task}.{self.contender.replace(' ', '-')}.{self.seed}"


def _told(value: Any) -> Any:
    """As plain JSON values; of a dataclass what differs from its defaults, so that an option that
    is added to it later changes nothing.
    """
    if is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in fields(value)}
        given = {f.name: own[f.name] for f in fields(value) if own[f.name] != f.default}
        return _told(given)
    if isinstance(value, Mapping):
        return {name: _told(value[name]) for name in sorted(value)}
    return [_told(inner) for inner in value] if isinstance(value, (list, tuple)) else value
