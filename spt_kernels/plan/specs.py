"""What structured tuning puts on a matrix: a LoRA or an Adapter, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LoraSpec:
    """A low-rank update `scale · B_i A_i` on each of some row ranges of one matrix.

    Attributes:
        rank: inner width of every `A_i [rank, in_features]` and `B_i [rows_i, rank]`.
        rows: half-open row ranges, ascending; the slices of a fused qkv, or the whole matrix.
        in_features: columns of the matrix.
        scale: factor of the update.
        dropout: probability with which an element of the input is dropped in training.
    """

    kind: ClassVar[str] = "lora"

    rank: int
    rows: tuple[tuple[int, int], ...]
    in_features: int
    scale: float = 1.0
    dropout: float = 0.1

    @property
    def num_parameters(self) -> int:
        """`Σ_i rank · (in_features + rows_i)`."""
        return sum(
            self.cost(self.rank, self.in_features, stop - start) for start, stop in self.rows
        )

    @staticmethod
    def cost(rank: int, in_features: int, out_features: int) -> int:
        """σ of the paper's Eq. 5: what one LoRA costs, `rank · (in_features + out_features)`."""
        return rank * (in_features + out_features)


@dataclass(frozen=True)
class AdapterSpec:
    """A bottleneck of width `rank` on each of some ranges of the output of one matrix.

    Attributes:
        rank: width of the bottleneck.
        rows: half-open ranges of output features, ascending.
    """

    kind: ClassVar[str] = "adapter"

    rank: int
    rows: tuple[tuple[int, int], ...]

    @property
    def num_parameters(self) -> int:
        """`Σ_i 2 · rank · rows_i + rank + rows_i`."""
        return sum(self.cost(self.rank, stop - start) for start, stop in self.rows)

    @staticmethod
    def cost(rank: int, out_features: int) -> int:
        """σ of the paper's Eq. 5: two matrices and two biases, `2 · rank · d + rank + d`."""
        return 2 * rank * out_features + rank + out_features


def module_cost(kind: str, rank: int, in_features: int, out_features: int) -> int:
    """σ of the paper's Eq. 5 for one matrix and a kind of module, `"lora"` or `"adapter"`."""
    if kind == LoraSpec.kind:
        return LoraSpec.cost(rank, in_features, out_features)
    return AdapterSpec.cost(rank, out_features)


def module_spec(
    kind: str,
    rank: int,
    rows: Sequence[tuple[int, int]],
    in_features: int,
    scale: float = 1.0,
    dropout: float = 0.1,
) -> LoraSpec | AdapterSpec:
    """A module of a kind on some rows of a matrix; scale and dropout are a LoRA's."""
    if kind == LoraSpec.kind:
        return LoraSpec(rank, tuple(rows), in_features, scale, dropout)
    return AdapterSpec(rank, tuple(rows))
