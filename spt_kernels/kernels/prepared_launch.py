"""Launches that are the same in every step but for the values of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .card import INTERPRETED


def prepared_launch(
    kernel: Any, n_programs: int, *arguments: Any, num_warps: int
) -> Callable[..., None]:
    """The launch of a kernel on the current device, without what Triton asks again each time.

    An ordinary launch binds its arguments, finds out what it would specialise on and looks the
    compiled kernel up by that; this one keeps the kernel, which is compiled and loaded here, so
    that a CUDA graph may begin with it.

    Args:
        kernel: `@triton.jit` function.
        n_programs: the grid.
        arguments: all of the kernel's, constants included, in its order. Those of a later call may
            differ in what the kernel does not specialise on: addresses if it is given those, or
            tensors of the same dtypes whose addresses are multiples of 16 if these are.
        num_warps: per program.

    Returns:
        A call that takes arguments like these and launches.
    """
    if INTERPRETED:
        return kernel[(n_programs,)]  # type: ignore[no-any-return]
    compiled = kernel.warmup(*arguments, grid=(n_programs,), num_warps=num_warps)
    return compiled[(n_programs, 1, 1)]  # type: ignore[no-any-return]
