"""The plan from the earliest block on whose training step fits into a given memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from .plan import Plan
from .selection import Overspent


def earliest_within(
    plan_from: Callable[[str | None], Plan],
    start: str | None,
    later: Sequence[str],
    memory_bytes: int | float,
    peak_of: Callable[[Plan], int],
) -> Plan:
    """The plan that forbids no more of the early blocks than it must; each is asked for once.

    A step needs less the later its plan begins: what lies before keeps nothing. So few plans are
    asked for their peaks: the one from `start`, the last one, and what halves the rest.

    Args:
        plan_from: makes the plan from a block on; raises `Overspent` where that has no room for it.
        start: the earliest block, None for everything.
        later: the blocks after it, in the order of the model.
        memory_bytes: what the peak may be at most.
        peak_of: the peak of a training step by a plan, in bytes.

    Raises:
        TypeError: as `check_memory`.
        ValueError: likewise, or no plan fits; says how much the least would need.
    """
    plan = plan_from(start)
    peaks = {plan.from_block: peak_of(plan)}
    if peaks[plan.from_block] <= memory_bytes:
        return plan
    plans: dict[str, Plan] = {}
    later, is_cut = list(later), False
    while later and not plans:
        try:
            plans[later[-1]] = plan_from(later[-1])
        except Overspent:  # too little to spend the budget on
            later.pop()
            is_cut = True

    def fits(block: str) -> bool:
        if block not in plans:
            plans[block] = plan_from(block)
        if block not in peaks:
            peaks[block] = peak_of(plans[block])
        return peaks[block] <= memory_bytes

    if not later or not fits(later[-1]):
        least = min(peaks, key=lambda block: peaks[block])
        whose = f"the plan from {least} on" if least else "the plan of all blocks"
        has_room = "a smaller budget, for which later blocks have room, " if is_cut else ""
        raise ValueError(
            f"memory_bytes: the least that a step needs is {_gib(peaks[least])}, by {whose}, got "
            f"{_gib(memory_bytes)}: {has_room}a smaller batch, another dtype or recomputation "
            "needs less"
        )
    return plans[later[bisect_left(later, True, hi=len(later) - 1, key=fits)]]


def check_memory(memory_bytes: Any, peak_of: Any) -> None:
    """Refuse a memory that is none, or one of which nobody can tell what fits.

    Raises:
        TypeError: `memory_bytes` is no number, or `peak_of` cannot be called.
        ValueError: one without the other, or a memory below 1 byte.
    """
    if (memory_bytes is None) != (peak_of is None):
        raise ValueError(
            "memory_bytes and peak_of go together: the one is what a step may take, the other "
            "tells of a plan what it takes; allocate_within(model, …) brings its own"
        )
    if memory_bytes is None:
        return
    check_bytes(memory_bytes)
    if not callable(peak_of):
        raise TypeError(f"peak_of must be a function of a Plan, got {peak_of!r}")


def check_bytes(memory_bytes: Any) -> None:
    """Refuse a memory that is no number of bytes (TypeError), or below one (ValueError)."""
    if isinstance(memory_bytes, bool) or not isinstance(memory_bytes, (int, float)):
        raise TypeError(f"memory_bytes must be a number of bytes, got {memory_bytes!r}")
    if not 1 <= memory_bytes < float("inf"):
        raise ValueError(f"memory_bytes must be at least 1, got {memory_bytes}")


def _gib(n_bytes: int | float) -> str:
    return f"{n_bytes / 2**30:,.3f} GiB"
