"""`allocate_within`: the best plan whose training step fits, by leaving early blocks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..memory import MemoryEstimate, estimate_memory
from ..plan import Plan, allocate
from ..plan.within import check_memory
from ..sensitivity import Sensitivity


@dataclass(frozen=True)
class PlanWithin:
    """A plan whose training step fits.

    Attributes:
        plan: its `from_block` and `forgone` say what it leaves alone and what that costs.
        estimate: of a step by it.
        limit_bytes: what the peak had to fit in, a reserve taken off.
        tried: accounted peaks in bytes of all plans that were tried, by their `from_block`.
    """

    plan: Plan
    estimate: MemoryEstimate
    limit_bytes: int
    tried: Mapping[str, int]


def allocate_within(
    model: nn.Module,
    sensitivity: Sensitivity,
    budget: int | float,
    memory_bytes: int | float,
    batch_shape: Sequence[int] | Mapping[str, Tensor],
    structured: str | None = "lora",
    rank: int = 8,
    *,
    rule: str = "paper",
    scale: float = 1.0,
    dropout: float = 0.1,
    from_block: int | str | None = None,
    reserve_bytes: int | float = 0,
    **how: Any,
) -> PlanWithin:
    """Spend a budget where it matters most and a training step by it still fits.

    What lies before the first tuned block keeps nothing for the backward and has none. So as few
    early blocks are forbidden as must be: the plan of one block earlier does not fit. Peaks are
    accounted for as `estimate_memory` does, of a handful of plans.

    Args:
        model: plain, as the sensitivity was measured on; not changed. Its parameters may be on the
            meta device.
        sensitivity: as for `allocate`, and so are `budget`, `structured`, `rank`, `rule`, `scale`,
            `dropout`; `from_block` is the earliest block that may be tuned in any case.
        memory_bytes: of the card; 8 GiB are `8 * 2**30`.
        batch_shape: shape of the input, `(batch, 3, height, width)`, or a batch that is a mapping.
        reserve_bytes: of `memory_bytes`, what is kept free: a card holds more than what is
            accounted, see `largest_batch`.
        how: arguments of `estimate_memory` that say how a step is taken, by name: `dtype`,
            `optimizer`, `loss_fn`, `checkpointing`, `device`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: what `allocate` or `estimate_memory` refuses, or no plan fits.
    """
    if isinstance(reserve_bytes, bool) or not isinstance(reserve_bytes, (int, float)):
        raise TypeError(f"reserve_bytes must be a number of bytes, got {reserve_bytes!r}")
    if not reserve_bytes >= 0:
        raise ValueError(f"reserve_bytes must be at least 0, got {reserve_bytes}")
    estimates: dict[str, MemoryEstimate] = {}

    def peak_of(plan: Plan) -> int:
        estimate = estimate_memory(model, batch_shape, plan, **how)
        estimates[plan.from_block] = estimate
        return estimate.peak_bytes

    check_memory(memory_bytes, peak_of)
    plan = allocate(
        sensitivity,
        budget,
        structured,
        rank,
        rule=rule,
        scale=scale,
        dropout=dropout,
        from_block=from_block,
        memory_bytes=memory_bytes - reserve_bytes,
        peak_of=peak_of,
    )
    tried = {block: estimate.peak_bytes for block, estimate in estimates.items()}
    limit = int(memory_bytes - reserve_bytes)
    return PlanWithin(plan, estimates[plan.from_block], limit, tried)
