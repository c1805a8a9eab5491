"""`AdapterLinear`: a bottleneck on the output of a Linear, or on some ranges of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .keep_fp32 import keeping_fp32
from .linear import SparseDeltaLinear
from .lora import add_to_rows, check_base, freeze_base, move_and_tag, plain_below, tag_all
from .sparse_delta import SparseDelta
from .tuned_linear import LoraCall

if TYPE_CHECKING:
    from ..plan import AdapterSpec


class AdapterLinear(nn.Module):
    """`y + Up(GELU(Down(y)))` on each of some ranges of the output `y = base(x)`.

    This is the sequential placement of the published code: right after the sensitive matrix, before
    whatever follows it, with biases and an up-projection that starts at zero. An Adapter is not
    linear and cannot be merged into the base layer.

    Attributes:
        base: the frozen layer; a `SparseDeltaLinear` keeps training its deltas.
        down_weight: Parameter `[rank, rows of all ranges]`, fp32.
        down_bias: Parameter `[ranges · rank]`.
        up_weight: Parameter `[rows of all ranges, rank]`, zero at first.
        up_bias: Parameter `[rows of all ranges]`, zero at first.
        spec: the `AdapterSpec`.

    Args:
        base: `nn.Linear` or `SparseDeltaLinear`. Its weight and bias are frozen.
        spec: rank and ranges.

    Raises:
        TypeError: `base` is of another type.
        ValueError: the spec is for a layer of other sizes.
    """

    base: nn.Linear | SparseDeltaLinear
    in_features: int
    out_features: int

    def __init__(self, base: nn.Linear | SparseDeltaLinear, spec: AdapterSpec) -> None:
        super().__init__()
        check_base(base, spec)
        freeze_base(self, base)
        self.spec = spec
        n_rows = sum(stop - start for start, stop in spec.rows)
        self.down_weight = nn.Parameter(torch.empty(spec.rank, n_rows))
        self.down_bias = nn.Parameter(torch.empty(len(spec.rows) * spec.rank))
        self.up_weight = nn.Parameter(torch.zeros(n_rows, spec.rank))
        self.up_bias = nn.Parameter(torch.zeros(n_rows))
        with torch.no_grad():
            for _, columns, part in self._ranges():
                width = columns.stop - columns.start
                down = torch.empty(spec.rank, width)  # as nn.Linear starts: its fan-in is the width
                self.down_weight[:, columns] = nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                self.down_bias[part].uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))
        move_and_tag(self, base.weight.device)

    @property
    def weight(self) -> Tensor:
        """Of the base layer."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the base layer."""
        return self.base.bias

    @property
    def plain(self) -> nn.Module:
        """The module this one stands for, with the parameters as they are now."""
        return plain_below(self)

    @property
    def spt_was_called(self) -> bool:
        """Whether its forward has ever run eagerly."""
        return bool(self.__dict__.get("_spt_called", False))

    def sparse_deltas(self) -> dict[str, SparseDelta]:
        """Local parameter name -> its sparse delta: those of the base layer."""
        return self.base.sparse_deltas() if isinstance(self.base, SparseDeltaLinear) else {}

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output, adapted."""
        if not torch.compiler.is_compiling():
            self.__dict__["_spt_called"] = True
        y = self.base.forward(x)  # its hooks are ours, and run once
        updates = []
        for rows, own, part in self._ranges():
            low = F.linear(
                y[..., rows],
                self.down_weight[:, own].to(y.dtype),
                self.down_bias[part].to(y.dtype),
            )
            updates.append(
                (
                    rows,
                    F.linear(
                        F.gelu(low), self.up_weight[own].to(y.dtype), self.up_bias[own].to(y.dtype)
                    ),
                )
            )
        return add_to_rows(y, updates)

    def extra_repr(self) -> str:
        """Sizes, rank and ranges."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.spec.rank}, rows={self.spec.rows}"
        )

    def _ranges(self) -> list[tuple[slice, slice, slice]]:
        # sliced like a LoRA: output features, own rows, own part of the bottleneck
        return LoraCall(self.spec.rank, self.spec.rows, 1.0).ranges()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLinear:
        super()._apply(keeping_fp32(fn, self._parameters.values()), recurse)
        tag_all(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        tag_all(self)
