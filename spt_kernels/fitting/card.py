"""`Card`: how fast a card multiplies and moves, and how long a step takes there by that."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..memory import Work
from ..ops.dtypes import FLOATS_OF_16_BITS

# The shares of its figures that an H100 reaches in a step, and the least that a kernel takes there:
# fitted to the kernel times of four steps of a ViT-B/16 (full and LoRA-16, batch 64, autocast and
# fp32, torch 2.11), which they give within 4 %. Other cards are taken to reach as much of theirs.
_OF_NARROW, _OF_FP32, _OF_BYTES, _LEAST_SECONDS = 0.4, 0.635, 0.825, 5e-6
# of the host's time for a launch, as in LoRA-16's step there
_HOST_SECONDS = 27e-6


@dataclass(frozen=True)
class Card:
    """The figures that its maker gives.

    Attributes:
        name: as torch tells it, without the maker's.
        fp32_tflops: of products in fp32, without TF32.
        narrow_tflops: of products of 16 bits that are summed in fp32, of dense matrices.
        gigabytes_per_s: of its memory.
    """

    name: str
    fp32_tflops: float
    narrow_tflops: float
    gigabytes_per_s: float

    def seconds_of(self, work: Work, *, captured: bool = False) -> float:
        """Of a step, by its arithmetic and its traffic: a model, not a measurement.

        Args:
            work: of the step.
            captured: whether it is a CUDA graph, which a host launches as one.
        """
        device = sum(
            times * max(self._products(call.flops, call.dtype), self._moves(call.moved_bytes))
            for call, times in work.calls.items()
        )
        return device if captured else max(device, work.launches * _HOST_SECONDS)

    def _products(self, flops: int, dtype: torch.dtype | None) -> float:
        is_narrow = dtype in FLOATS_OF_16_BITS
        rate = self.narrow_tflops * _OF_NARROW if is_narrow else self.fp32_tflops * _OF_FP32
        return flops / (rate * 1e12)

    def _moves(self, n_bytes: int) -> float:
        return max(n_bytes / (self.gigabytes_per_s * _OF_BYTES * 1e9), _LEAST_SECONDS)


# Peaks without sparsity, as their makers' data sheets and white papers give them
CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card("RTX 3060", 12.7, 25.6, 360),
        Card("RTX 3070", 20.3, 40.6, 448),
        Card("RTX 3080", 29.8, 59.5, 760),
        Card("RTX 3090", 35.6, 71, 936),
        Card("RTX 4060", 15.1, 30.2, 272),
        Card("RTX 4070", 29.1, 58.3, 504),
        Card("RTX 4080", 48.7, 97.5, 717),
        Card("RTX 4090", 82.6, 165, 1008),
        Card("L4", 30.3, 121, 300),
        Card("A10", 31.2, 125, 600),
        Card("A100", 19.5, 312, 1555),
        Card("H100", 66.9, 989, 3350),
        Card("H200", 66.9, 989, 4800),
    )
}


def card_named(name: str) -> Card:
    """The card of this name, or the one whose name is among the words that torch calls it.

    Raises:
        ValueError: there is no figure of such a card.
    """
    known = [
        # but an L40S is no L4, an RTX A1000 no A100
        card
        for own, card in CARDS.items()
        if re.search(rf"\b{own}(ti)?\b", name, re.IGNORECASE)
    ]
    if not known:
        raise ValueError(f"card: expected one of {', '.join(CARDS)}, got {name!r}")
    return max(known, key=lambda card: len(card.name))


def card_of(name: str | None = None) -> Card:
    """The card of a name; without one that at hand, or where it has no figures an RTX 3060.

    Raises:
        ValueError: as `card_named`.
    """
    if name is not None:
        return card_named(name)
    if torch.cuda.is_available():
        with contextlib.suppress(ValueError):
            return card_named(torch.cuda.get_device_name())
    return CARDS["RTX 3060"]
