"""Counts the operators that a call dispatches: what its host has to do, whatever the machine."""

from __future__ import annotations

from collections.abc import Callable

from spt_kernels.costs.step_profile import profile_call

WARM_UP = 3  # calls after which nothing is prepared any more


def count_operators(run: Callable[[], object]) -> int:
    """Operators of a call, those that others are made of included."""
    for _ in range(WARM_UP):
        run()
    return profile_call(run, on_gpu=False).operators
