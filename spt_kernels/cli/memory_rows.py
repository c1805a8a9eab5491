"""What `spt-kernels memory` estimates for each of its rows, and what it finds out about one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..memory_estimate import MemoryEstimate
from ..memory_fit import LargestBatch, PeakByBatch
from ..method import Method
from ..method_plan import make_plan
from ..plan import Plan
from ..sensitivity import Sensitivity
from ..synthetic_sensitivity import skewed_sensitivity

TABLE = ("full", "linear", "bias", "lora", "spt-lora", "spt-adapter", "spt-unstructured")
TABLE_LORA_RANK = 16  # the paper's


@dataclass(frozen=True)
class Row:
    """One way to train a model.

    Attributes:
        method: what `estimate_memory` calls it, None for what the plan or the model says itself.
        plan: None for everything, and for a model that is not trained.
        rank: of its LoRA or Adapter modules, where it was chosen here.
        is_made_up: whether no sensitivity was measured for the plan.
    """

    method: str | None = None
    plan: Plan | None = None
    rank: int | None = None
    is_made_up: bool = False

    def peaks(self, base: nn.Module, image_shape: tuple[int, ...], how: Any) -> PeakByBatch:
        """Its estimates for any batch."""
        method = self.method if self.plan is not None or self.method == "full" else None
        return PeakByBatch(base, image_shape, self.plan, method=method, **how)


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
        value = {
            **self.estimate.to_json(),
            "method": self.row.method or self.estimate.method,
            "budget": None if self.row.plan is None else self.row.plan.budget,
            "rank": self.row.rank,
            "made_up_scores": self.row.is_made_up,
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
    estimate = peaks.at(batch)
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
    checkpointing: dict[str, Any] = {"checkpointing": True}
    bf16: dict[str, Any] = {"dtype": "bf16"}
    if how["dtype"] == "bf16":
        bf16 = {}
    if not how["training"] or how["checkpointing"] or not _admits_checkpointing(base):
        checkpointing = {}
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


def rows_of(
    base: nn.Module,
    names: tuple[str, ...],
    plan: Path | None,
    budget: int | float | None,
    rank: int | None,
    *,
    training: bool,
) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows that were asked for by name, or else all there are.

    Returns:
        The rows, and of all there are those that the model does not admit, with the reason.

    Raises:
        ValueError: an unknown method, or one that the budget, the rank or the plan is not for.
    """
    scores = functools.cache(lambda: skewed_sensitivity(base))
    if plan is not None and names:
        if len(names) > 1 or budget is not None or rank is not None:
            raise ValueError(
                "--plan: goes with one --method, and without --budget and --rank, which it has"
            )
        return {names[0]: Row(Method(names[0]).name, Plan.load(plan))}, {}
    if names:
        return {name: _row(base, name, budget, rank, scores) for name in names}, {}
    own = {} if plan is None else {"the plan": Row(plan=Plan.load(plan))}
    if not training:
        return own or {"plain": Row("plain")}, {}
    rows, missing = {}, {}
    for name in TABLE:
        is_spt = name.startswith("spt-")
        width = rank or (TABLE_LORA_RANK if name == "lora" else None)
        sized = width if is_spt or name == "lora" else None
        label = f"lora-{width}" if name == "lora" else name
        try:
            rows[label] = _row(base, name, budget if is_spt else None, sized, scores)
        except ValueError as error:
            missing[label] = str(error)
    return {**rows, **own}, missing


def _row(
    base: nn.Module,
    name: str,
    budget: int | float | None,
    rank: int | None,
    scores: Callable[[], Sensitivity],
) -> Row:
    lora, _, width = name.partition("-")
    if lora == "lora" and width.isdecimal():
        if rank is not None:
            raise ValueError(f"--rank: {name} says its own, got {rank}")
        name, rank = lora, int(width)
    chosen = Method(name, budget, rank)
    is_spt = chosen.is_sensitivity_aware
    plan = make_plan(base, chosen, scores() if is_spt else None)
    modules = list(plan.structured.values()) if plan is not None else []
    return Row(name, plan, modules[0].rank if modules else None, is_spt)
