"""`LoraTerms`: what one forward of a LoRA is, without its products."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .row_ranges import RangeGroup


class LoraTerms(NamedTuple):
    """One forward of a LoRA: what it is, and which elements of its input are dropped.

    Attributes:
        groups: of `groups_of`.
        scale: factor of the update.
        dropout: probability of dropping an element; 0 outside training.
        seed: which elements, or the key of it in memory; forward and backward both make the mask
            from it.
        only: the one range that it is on: plain matrix products serve it, for fewer views. The last
            field, which a pickled layer of before 0.7.2 does without.
    """

    groups: tuple[RangeGroup, ...]
    scale: float
    dropout: float = 0.0
    seed: int | Tensor = 0
    only: RangeGroup | None = None

    @property
    def kept_scale(self) -> float:
        """What makes up for the dropped elements; 1 where none are."""
        return 0.0 if self.dropout >= 1.0 else 1.0 / (1.0 - self.dropout)
