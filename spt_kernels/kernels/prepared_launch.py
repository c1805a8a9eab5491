"""Launches that are the same in every step but for the values of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .card import INTERPRETED

_MOST_LAUNCHES = 256  # of a model whose batches have ever other shapes


def prepared_launch(
    kernel: Any, n_programs: int, *arguments: Any, **options: int
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
        options: what the compiler is told, `num_warps` for one.

    Returns:
        A call that takes arguments like these and launches.
    """
    if INTERPRETED:
        return kernel[(n_programs,)]  # type: ignore[no-any-return]
    compiled = kernel.warmup(*arguments, grid=(n_programs,), **options)
    return compiled[(n_programs, 1, 1)]  # type: ignore[no-any-return]


class PreparedLaunches:
    """Launches of kernels, each prepared by the first layer that has such arguments.

    The layers of a model are alike, and so are its steps. An ordinary launch takes a slow host
    longer than all the rest of a layer's backward.
    """

    def __init__(self) -> None:
        self._launches: dict[tuple[Any, ...], Callable[..., None]] = {}

    def launch(
        self,
        kernel: Any,
        n_programs: int,
        tensors: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        values: tuple[float, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        """Launch a kernel whose arguments come in this order.

        Args:
            kernel: `@triton.jit` function.
            n_programs: the grid, which sizes and constants settle.
            tensors: on the current device.
            sizes: integers that a launch is prepared for.
            values: numbers that differ from launch to launch; the kernel does not specialise on
                those that are integers.
            constants: what is compiled in.
            options: what the compiler is told, which sizes and constants settle.
        """
        arguments = *tensors, *sizes, *values, *constants
        self.prepared(kernel, n_programs, tensors, sizes, constants, arguments, options)(*arguments)

    def prepared(
        self,
        kernel: Any,
        n_programs: int,
        tensors: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        arguments: tuple[Any, ...],
        options: dict[str, int],
    ) -> Callable[..., None]:
        """The launch for such arguments."""
        # all that Triton makes another kernel for: of each tensor its own alignment and dtype
        alike = [(t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
        key = kernel, tensors[0].device, sizes, constants, *alike
        launch = self._launches.get(key)
        if launch is None:
            launch = prepared_launch(kernel, n_programs, *arguments, **options)
            if len(self._launches) >= _MOST_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
        return launch
