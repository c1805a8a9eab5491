"""Launches that are the same in every step but for the values of their arguments."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
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
        A call that takes arguments like these and launches. In the place of a tensor it takes the
        address, unless kernels are interpreted: `addressed` gives what it takes.
    """
    return functools.partial(load(kernel, *arguments, **options), n_programs)


def load(kernel: Any, *arguments: Any, **options: int) -> Callable[..., None]:
    """The kernel of a `prepared_launch`, which takes the number of programs first."""
    if INTERPRETED:
        return lambda n_programs, *given: kernel[(n_programs, 1, 1)](*given)
    return without_detours(kernel.warmup(*arguments, grid=(1,), **options))


def without_detours(compiled: Any) -> Callable[..., None]:
    """The launch of a compiled kernel on the current device, past what Triton does for listeners.

    Its own tells hooks of each launch, with or without any that listen: three frames of Python and
    a dictionary, on a slow host longer than the launch. Where one listens, as a profiler does, it
    is told as ever.
    """
    compiled[(1, 1, 1)]  # loads it
    driver = triton.runtime.driver.active
    device, stream_on = driver.get_current_device(), driver.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    runtime = triton.knobs.runtime

    def launch(n_programs: int, *arguments: Any) -> None:
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            compiled[(n_programs, 1, 1)](*arguments)
        else:
            stream = stream_on(device)
            run(n_programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    return launch


class Prepared(NamedTuple):
    """A launch, and what of its arguments never changes.

    Attributes:
        launch: takes what `addressed` gives for tensors, numbers and constants, and launches.
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
    alignment of every tensor that is given; and what settles the grid, and the device.
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


def addressed(*tensors: Tensor) -> tuple[Sequence[Any], int]:
    """What prepared launches take for tensors, and their alignment, a part of every key.

    Of a tensor Triton asks its method for the address, and the driver whether that is a card's; of
    a number it asks nothing. The interpreter takes tensors alone. The alignment has a bit for each
    tensor, set where vectors of 16 bytes do not fit its address; those that a launcher has made
    itself need not be asked, for memory that torch gives fits.

    Raises:
        ValueError: they lie on several devices: a kernel would end the process's use of the card.
    """
    if len(set(map(_number_of_device, tensors))) > 1:
        devices = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"tensors must lie on one device, got {devices}")
    addresses = [*map(address_of, tensors)]
    bits = 0
    if functools.reduce(operator.or_, addresses, 0) % 16:  # seldom
        for address in addresses:
            bits = 2 * bits + (address % 16 != 0)
    return tensors if INTERPRETED else addresses, bits


_number_of_device = Tensor.get_device  # -1 is a CPU
address_of = Tensor.data_ptr
# what a prepared launch takes for a tensor that the launcher has made
pointer_to: Callable[[Tensor], Any] = (lambda tensor: tensor) if INTERPRETED else address_of
