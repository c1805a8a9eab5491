"""Gradients that were observed held against those of plain autograd, parameter by parameter.

What stays of two gradients is how large they are, and how far apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Lengths:
    """Of the gradients of one parameter, one for each sample that has any."""

    numel: int
    true: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)


class Comparison:
    """How far the observed gradients of several samples are from the true ones.

    Attributes:
        used: names of the parameters that have a true gradient of some sample.
        kept: true gradients by sample and name.

    Args:
        keep: names of the parameters whose true gradients are kept.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        self.used: set[str] = set()
        self.kept: dict[tuple[int, str], Tensor] = {}
        self._keep = keep
        self._lengths: dict[str, _Lengths] = {}
        self._samples: set[int] = set()

    def take(self, sample: int, name: str, true: Tensor | None, observed: Tensor | None) -> None:
        """Compare two gradients, of which a missing one is all zeros."""
        given = true if true is not None else observed
        if given is None:
            return
        self._samples.add(sample)
        lengths = self._lengths.setdefault(name, _Lengths(given.numel()))
        if true is not None:
            self.used.add(name)
            lengths.true.append(_length(true))
            if name in self._keep:
                self.kept[sample, name] = true.clone()
            if observed is not None:
                given = observed - true
        lengths.apart.append(_length(given))

    def typical(self) -> float:
        """Root mean square of the largest true gradient: rounding leaves some where is none."""
        each = [
            length / lengths.numel**0.5
            for lengths in self._lengths.values()
            for length in lengths.true
            if lengths.numel
        ]
        return max(each, default=0.0)

    def agrees(self, name: str, tolerance: float, slack: float = 0.0) -> bool:
        """Whether they are the same but for `tolerance` of all, and `slack` in each number."""
        lengths = self._lengths.get(name)
        if lengths is None:
            return False
        rounding = slack * (len(self._samples) * lengths.numel) ** 0.5
        return _joint(lengths.apart) <= tolerance * _joint(lengths.true) + rounding


def _length(gradient: Tensor) -> float:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return float(torch.linalg.vector_norm(gradient, dtype=dtype))


def _joint(lengths: Iterable[float]) -> float:
    return math.sqrt(sum(length * length for length in lengths))
