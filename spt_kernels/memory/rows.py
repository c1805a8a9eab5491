"""Methods side by side: what a step of each takes, and the largest batch that fits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..methods import Method, entry_of, make_plan, table_names
from ..plan import Plan
from ..sensitivity import Sensitivity, skewed_sensitivity
from .estimate import MemoryEstimate
from .fit import LargestBatch, PeakByBatch
from .made_up import check_called, puts_modules, uncalled_of
from .step import Step

_TABLE_LORA_RANK = 16  # the paper's
# What a model, which is anybody's code, raises where it cannot be tuned so: one row's matter alone
_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Row:
    """One way to train a model.

    Attributes:
        method: None for what the plan says, and where there is no plan either for nothing at all.
        plan: of a method that takes one.
        is_made_up: whether no sensitivity was measured for the plan.
    """

    method: Method | None = None
    plan: Plan | None = None
    is_made_up: bool = False

    def asked(self) -> dict[str, Any]:
        """The arguments of `estimate_memory` that say what is trained."""
        asked: dict[str, Any] = {"plan": self.plan}
        if self.method is not None:
            asked["method"] = self.method.name
            if self.plan is None:
                asked |= {"budget": self.method.budget, "rank": self.method.rank}
        return asked

    def peaks(self, base: nn.Module, image_shape: tuple[int, ...], how: Any) -> PeakByBatch:
        """Its estimates for any batch."""
        return PeakByBatch(base, image_shape, **self.asked(), **how)


@dataclass(frozen=True)
class Answer:
    """What was found out about a row.

    Attributes:
        row: what was asked about.
        estimate: at the batch that was asked for.
        found: the largest batch by GiB.
        otherwise: where none fits, the estimate of the smallest step with other options, by these.
    """

    row: Row
    estimate: MemoryEstimate
    found: Mapping[float, LargestBatch] = field(default_factory=dict)
    otherwise: Mapping[str, MemoryEstimate] = field(default_factory=dict)

    @property
    def smallest(self) -> MemoryEstimate | None:
        """The smallest step, if it did not fit everywhere."""
        return next((found.estimate for found in self.found.values() if not found), None)

    def to_json(self) -> dict[str, Any]:
        """One object; flat but for the lists of what fits."""
        plan = self.row.plan
        modules = list(plan.structured.values()) if plan is not None else []
        is_plain = plan is None and self.row.method is None
        value = {
            **self.estimate.to_json(),
            "method": "plain" if is_plain else self.estimate.method,
            "budget": None if plan is None else plan.budget,
            "rank": modules[0].rank if modules else None,
        }
        if self.found:
            value["fits"] = [
                {
                    "gib": gib,
                    "limit_bytes": found.limit_bytes,
                    "batch": found.batch,
                    "peak_bytes": found.estimate.peak_bytes,
                    "peak_bytes_of_one_more": found.beyond.peak_bytes,
                }
                for gib, found in self.found.items()
            ]
        if self.otherwise:
            value["smallest_step_otherwise"] = [e.to_json() for e in self.otherwise.values()]
        return value


def answer(
    row: Row,
    base: nn.Module,
    image_shape: tuple[int, ...],
    batch: int,
    limits: Mapping[float, int],
    how: Mapping[str, Any],
) -> Answer:
    """Estimate a row at `batch`, and look for the largest batch within each limit (bytes)."""
    peaks = row.peaks(base, image_shape, how)
    estimate = replace(peaks.at(batch), made_up_scores=row.is_made_up)
    found = {gib: peaks.largest(limit) for gib, limit in limits.items()}
    asked = Answer(row, estimate, found)
    if asked.smallest is None:
        return asked
    images = asked.smallest.batch_shape[0]
    otherwise = {
        way: row.peaks(base, image_shape, {**how, **changed}).at(images)
        for way, changed in _other_ways(base, how).items()
    }
    return Answer(row, estimate, found, otherwise)


def _other_ways(base: nn.Module, how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options that need less, of those that the model admits and that were not asked for yet."""
    bf16: dict[str, Any] = {} if how.get("dtype") == "bf16" else {"dtype": "bf16"}
    may_help = how.get("training", True) and not how.get("checkpointing")
    may_help = may_help and _admits_checkpointing(base)
    checkpointing: dict[str, Any] = {"checkpointing": True} if may_help else {}
    ways = {"checkpointing": checkpointing, "bf16": bf16}
    ways = {way: changed for way, changed in ways.items() if changed}
    return ways if len(ways) < 2 else {**ways, "both": {**checkpointing, **bf16}}


def _admits_checkpointing(base: nn.Module) -> bool:
    switch: Any = getattr(base, "set_grad_checkpointing", None)
    try:
        switch(True)
    except (AssertionError, TypeError):  # timm's way to say no, and no such method
        return False
    switch(False)
    return True


def methods_of(
    names: tuple[str, ...],
    budget: int | float | None,
    rank: int | None,
    from_block: int | str | None = None,
) -> dict[str, Method]:
    """The methods that were asked for by name, or else all but baselines, with what they read.

    Raises:
        ValueError: an unknown method, or one that the budget, the rank or the block is not for.
    """
    if names:
        return {name: Method(name, budget, rank, from_block=from_block) for name in names}
    table = {}
    for name in table_names():
        options = entry_of(name).options
        if not entry_of(name).is_baseline:
            width = _TABLE_LORA_RANK if rank is None and name == "lora" else rank
            # LoRA is sized by its rank here: that of the rival whose name says it
            own = budget if "budget" in options and name != "lora" else None
            # what a rank is to AdaptFormer is its width, and not that of all others
            has_rank = "rank" in options and name != "adaptformer"
            start = from_block if "from_block" in options else None
            table[name] = Method(name, own, width if has_rank else None, from_block=start)
    return table


class Rows:
    """Makes the rows of one model; scores are made up once, when a method first asks for them.

    Args:
        base: the plain model.
        image_shape: of one input.
    """

    def __init__(self, base: nn.Module, image_shape: Sequence[int]) -> None:
        self._base, self._shape = base, tuple(image_shape)

    def of(self, method: Method) -> Row:
        """The row of a method, which chooses, where it does, by made-up scores.

        Raises:
            ValueError: as `make_plan`, or the method puts a module where the model calls none.
        """
        if method.is_sensitivity_aware:
            return Row(method, make_plan(self._base, method, self._scores), is_made_up=True)
        plan = make_plan(self._base, method)
        if puts_modules(method):
            check_called(self._base, method, plan, self._uncalled)
        return Row(method, plan)

    @functools.cached_property
    def _uncalled(self) -> frozenset[str]:
        """Which weights the model reads itself."""
        return uncalled_of(self._base, self._shape)

    @functools.cached_property
    def _scores(self) -> Sensitivity:
        return skewed_sensitivity(self._base, self._uncalled)


def estimate_methods(
    model: nn.Module,
    batch_shape: Sequence[int],
    methods: Sequence[str] = (),
    *,
    budget: int | float | None = None,
    rank: int | None = None,
    from_block: int | str | None = None,
    limits_bytes: Sequence[int] = (),
    on_row: Callable[[str], object] = lambda name: None,
    **how: Any,
) -> tuple[dict[str, Answer], dict[str, Exception]]:
    """The accounted peak of a step of several methods side by side, as `spt-kernels memory` has it.

    Args:
        model: plain; not changed. A copy without values is made, which its attributes must allow.
        batch_shape: `(batch, 3, height, width)`.
        methods: names of `spt_kernels.methods`; none stands for all but baselines.
        budget: as for `estimate_memory`, of the methods that have one.
        rank: likewise.
        from_block: the first block that a method which chooses may choose of.
        limits_bytes: for each, the largest batch whose peak is at most that is looked for.
        on_row: called with the name of each method that is done.
        how: `dtype`, `optimizer` and the other arguments of `estimate_memory`.

    Returns:
        What was found out about each method, and why others cannot tune this model.

    Raises:
        TypeError: an argument that no step has.
        ValueError: an unknown method, or one that budget, rank or block is not for; or what
            `estimate_memory` refuses of the others.
    """
    Step.of(how)  # what is no step is nobody's but the caller's
    batch, *image_shape = batch_shape
    rows, asked = Rows(model, image_shape), methods_of(tuple(methods), budget, rank, from_block)
    makers = {name: functools.partial(rows.of, method) for name, method in asked.items()}
    limits = {limit / 2**30: limit for limit in limits_bytes}
    return estimate_rows(model, tuple(image_shape), batch, makers, limits, how, on_row)


def estimate_rows(
    base: nn.Module,
    image_shape: tuple[int, ...],
    batch: int,
    rows: Mapping[str, Callable[[], Row]],
    limits: Mapping[float, int],
    how: Mapping[str, Any],
    on_row: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, Answer], dict[str, Exception]]:
    """What is found out about each row, and what was raised where a model cannot be tuned so.

    Args:
        base: the plain model.
        image_shape: of one input.
        batch: images.
        rows: made when their turn comes, by name.
        limits: bytes to look for the largest batch in, by GiB.
        how: all other arguments of `estimate_memory`.
        on_row: called with the name of each that is done.
    """
    answers: dict[str, Answer] = {}
    missing: dict[str, Exception] = {}
    for name, make in rows.items():
        try:
            answers[name] = answer(make(), base, image_shape, batch, limits, how)
        except _FAILURES as error:
            missing[name] = error
        on_row(name)
    return answers, missing
