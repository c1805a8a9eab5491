"""What `spt-kernels memory` estimates for each of its rows, and what it finds out about one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from ..finetuning.job.given_plan import check_agrees, load_plan, method_of
from ..memory import LargestBatch, MemoryEstimate, PeakByBatch
from ..memory.made_up import check_called, puts_modules
from ..methods import Method, entry_of, make_plan, table_names
from ..plan import Plan
from ..sensitivity import Sensitivity

TABLE_LORA_RANK = 16  # the paper's


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
    how: dict[str, Any],
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


def _other_ways(base: nn.Module, how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options that need less, of those that the model admits and that were not asked for yet."""
    bf16: dict[str, Any] = {} if how["dtype"] == "bf16" else {"dtype": "bf16"}
    may_help = how["training"] and not how["checkpointing"] and _admits_checkpointing(base)
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
            width = TABLE_LORA_RANK if rank is None and name == "lora" else rank
            # LoRA is sized by its rank here: that of the rival whose name says it
            own = budget if "budget" in options and name != "lora" else None
            # what a rank is to AdaptFormer is its width, and not that of all others
            has_rank = "rank" in options and name != "adaptformer"
            start = from_block if "from_block" in options else None
            table[name] = Method(name, own, width if has_rank else None, from_block=start)
    return table


def row_of(
    base: nn.Module,
    method: Method,
    uncalled: Callable[[], frozenset[str]],
    scores: Callable[[], Sensitivity],
) -> Row:
    """The row of a method, which chooses, where it does, by made-up scores.

    Args:
        base: the plain model.
        method: which one.
        uncalled: tells which weights the model reads itself.
        scores: made up, and knowing these.

    Raises:
        ValueError: as `make_plan`, or the method puts a module where the model calls none.
    """
    if method.is_sensitivity_aware:
        return Row(method, make_plan(base, method, scores()), is_made_up=True)
    plan = make_plan(base, method)
    if puts_modules(method):
        check_called(base, method, plan, uncalled())
    return Row(method, plan)


def row_of_plan(
    names: tuple[str, ...], file: Path, given: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, Row]:
    """The row of a saved plan, by the one name that was given, if any.

    Args:
        names: of methods; none or one.
        file: the plan.
        given: fields of `Method` that were asked for beside it.

    Raises:
        ValueError: there is no such file, or the plan is not of this method and with these fields.
    """
    plan = load_plan(file)
    check_agrees(plan, names[0] if names else None, given)
    if not names:
        return "the plan", Row(plan=plan)
    return names[0], Row(method_of(plan, names[0]), plan)
