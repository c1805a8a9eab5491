"""`RandomState`: the generators that a region may draw from, so that it draws the same again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

Generator = tuple[Callable[[], Tensor], Callable[[Tensor], object]]  # reads, and writes, its state


class RandomState:
    """The states of the CPU's generator and of that of a device, as they were when it was made.

    Args:
        device: of the region's input.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = _generators(device)
        self._states = [read() for read, _ in self._generators]

    def has_moved(self) -> list[bool]:
        """Of each generator, the CPU's first, whether anything was drawn since then."""
        now = [read() for read, _ in self._generators]
        # their bytes: a comparison of tensors would be an operator in every forward
        return [
            a.numpy().tobytes() != b.numpy().tobytes()
            for a, b in zip(self._states, now, strict=True)
        ]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw within what was drawn from then on; outside nothing was drawn."""
        now = [read() for read, _ in self._generators]
        self._write(self._states)
        try:
            yield
        finally:
            self._write(now)

    def _write(self, states: list[Tensor]) -> None:
        for (_, write), state in zip(self._generators, states, strict=True):
            write(state)


def is_capturing(device: torch.device) -> bool:
    """Whether what runs goes into a CUDA graph, where no generator's state can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _generators(device: torch.device) -> list[Generator]:
    found: list[Generator] = [
        (torch.default_generator.get_state, torch.default_generator.set_state)
    ]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        own = torch.cuda.default_generators[index : index + 1]  # none where a card is pretended
        found += [(each.get_state, each.set_state) for each in own]
    elif device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device.type)
        found.append(
            (partial(module.get_rng_state, device), partial(module.set_rng_state, device=device))
        )
    return found
