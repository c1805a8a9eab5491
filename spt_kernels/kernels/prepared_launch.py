"""Launches that are the same in every step but for the values of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    loaded = load(kernel, *arguments, **options)
    return loaded[(n_programs, 1, 1)]  # type: ignore[no-any-return]


def load(kernel: Any, *arguments: Any, **options: int) -> Any:
    """The kernel of a `prepared_launch`, which it is for any number of programs in brackets."""
    return kernel if INTERPRETED else kernel.warmup(*arguments, grid=(1,), **options)


class Prepared(NamedTuple):
    """A launch, and what of its arguments never changes.

    Attributes:
        launch: takes tensors, numbers and constants, and launches.
        sizes: of the numbers, those that are settled.
        constants: what is compiled in.
    """

    launch: Callable[..., None]
    sizes: tuple[int, ...]
    constants: tuple[Any, ...]


class PreparedLaunches:
    """Launches of kernels, each prepared by the first layer that has such arguments.

    The layers of a model are alike, and so are its steps. An ordinary launch takes a slow host
    longer than all the rest of a layer's backward; that all is looked up by one key is why the key
    has to hold everything that Triton makes another kernel for: dtypes, sizes, constants and the
    `alignment` of every tensor; and what settles the grid, and the device.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Prepared] = {}
        self.get = self._made.get  # without a frame of its own

    def prepare(
        self,
        key: tuple[Any, ...],
        kernel: Any,
        n_programs: int,
        tensors: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        values: tuple[float, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> Prepared:
        """Prepare a launch on the current device of a kernel whose arguments come in this order.

        Args:
            key: what it is found by later.
            kernel: `@triton.jit` function.
            n_programs: the grid.
            tensors: like those of later calls.
            sizes: integers that are the same in all of them.
            values: numbers like those of later calls; the kernel does not specialise on integers
                among them.
            constants: what is compiled in.
            options: what the compiler is told.
        """
        arguments = *tensors, *sizes, *values, *constants
        launch = prepared_launch(kernel, n_programs, *arguments, **options)
        if len(self._made) >= _MOST_LAUNCHES:
            self._made.clear()
        made = self._made[key] = Prepared(launch, sizes, constants)
        return made


def alignment(*tensors: Tensor) -> int:
    """Of which of these vectors of 16 bytes do not fit the address: a bit for each."""
    bits = 0
    for tensor in tensors:
        bits = 2 * bits + (tensor.data_ptr() % 16 != 0)
    return bits
