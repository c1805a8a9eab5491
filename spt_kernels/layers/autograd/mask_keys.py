"""Seeds of LoRA's dropout masks: numbers as a rule, words on the device inside of a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ...ops.dropout import key_of
from .recording import recording_in_use

_SEEDS = 2**62
_IN_USE: ContextVar[MaskKeys | None] = ContextVar("spt_mask_keys", default=None)


def draw_seed() -> int | Tensor:
    """From the default CPU generator, which `torch.manual_seed` and checkpointing reproduce.

    While `MaskKeys` are in use, it is the next of those. A forward that is run again has the seed
    that it had.
    """
    recording = recording_in_use()
    seed: int | Tensor | None = None if recording is None else recording.recall()
    if seed is not None:
        if isinstance(seed, int):
            _draw()  # what else draws from this generator must find it where it did
        return seed
    keys = _IN_USE.get()
    seed = _draw() if keys is None else keys.next()
    if recording is not None:
        recording.note(seed)
    return seed


def _draw() -> int:
    return int(torch.randint(_SEEDS, (), device="cpu").item())


class MaskKeys:
    """Keys of the masks that one forward draws, in memory that a CUDA graph reads at each replay.

    The first forward under `in_use` counts its masks; `allocate` then makes room for as many, and
    `refill` draws their seeds as an eager forward would: from the same generator, in its order.

    Args:
        device: of the activations.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0
        self._words: Tensor | None = None  # [masks, 2] int64
        self._taken = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the forward within take its seeds from here."""
        self._taken = 0
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def next(self) -> int | Tensor:
        """The seed of the next mask: a number while masks are counted, then a key, int64 `[2]`."""
        if self._words is None:
            self._count += 1
            return _draw()
        key = self._words[self._taken]
        self._taken += 1
        return key

    def allocate(self) -> None:
        """Make room for the masks that were counted."""
        self._words = torch.zeros(self._count, 2, dtype=torch.int64, device=self._device)

    def refill(self) -> None:
        """Draw the seeds of the next forward; the device takes them when it gets there."""
        if self._count and self._words is not None:
            seeds = torch.randint(_SEEDS, (self._count,), device="cpu")
            words = torch.stack(key_of(seeds), 1)
            on_card = self._device.type == "cuda"
            self._words.copy_(words.pin_memory() if on_card else words, non_blocking=True)
