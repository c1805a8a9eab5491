"""`StructuredLinear`: what LoRA and Adapter share, a frozen base layer under new parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .keep_fp32 import keeping_fp32
from .linear import SparseDeltaLinear
from .plain_module import share_hooks
from .row_ranges import ranges_of
from .sparse_delta import Owner, SparseDelta, tag
from .tuned_linear import TunedLinear


class StructuredLinear(Owner):
    """A frozen Linear with a small trained module on it; subclasses add parameters and forward.

    Attributes:
        base: the frozen layer; a `SparseDeltaLinear` keeps training its deltas.
        spec: what is on it.
        in_features: of the base layer.
        out_features: of the base layer.
    """

    base: nn.Linear | SparseDeltaLinear
    spec: Any
    in_features: int
    out_features: int

    @property
    def weight(self) -> Tensor:
        """Of the base layer, without what is trained on it: there is no one matrix with an Adapter.

        Code that reads a weight instead of calling the layer passes the LoRA or Adapter by; for a
        LoRA `weight + update()` is the whole matrix, which `merge` leaves behind.
        """
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the base layer."""
        return self.base.bias

    @property
    def plain(self) -> nn.Module:
        """The module this one stands for, with the parameters as they are now."""
        base = self.base
        return base.plain if isinstance(base, SparseDeltaLinear) else base

    def sparse_deltas(self) -> dict[str, SparseDelta]:
        """Local parameter name -> its sparse delta: those of the base layer."""
        return self.base.sparse_deltas() if isinstance(self.base, SparseDeltaLinear) else {}

    def extra_repr(self) -> str:
        """Sizes, rank and ranges."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.spec.rank}, rows={self.spec.rows}"
        )

    def _put_on(self, base: nn.Linear | SparseDeltaLinear, spec: Any) -> None:
        """Register the base layer, frozen, and take over its sizes and hooks."""
        base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)
        self.base, self.spec = base, spec
        self._ranges = ranges_of(spec.rank, spec.rows)
        self.in_features, self.out_features = base.in_features, base.out_features
        share_hooks(self, base)
        self.train(base.training)

    def _traced_base(self, x: Tensor) -> Tensor:
        """The base layer's output in code for a compiler, which need not keep a cast weight."""
        base = self.base
        if not torch.is_grad_enabled():
            return F.linear(x, base.weight, base.bias)
        deltas: tuple[Any, ...] = (None, None, None, None)
        if isinstance(base, SparseDeltaLinear):
            deltas = base.trained_tensors()
        y: Tensor = TunedLinear.apply(x, base.weight, base.bias, *deltas, None, None, None)
        return y

    def _move_and_tag(self, device: torch.device) -> None:
        """Put the new parameters on a device.

        They are drawn on the CPU: the same seed gives the same start on every device.
        """
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        self._tag_all()

    def _tag_all(self) -> None:
        """Let every own parameter lead back to this module."""
        for parameter in self.parameters(recurse=False):
            tag(parameter, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredLinear:
        super()._apply(keeping_fp32(fn, self.parameters(recurse=False)), recurse)
        self._tag_all()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tag_all()


def check_base(base: Any, spec: Any) -> None:
    """Refuse a base layer that a LoRA or an Adapter of this spec cannot be put on."""
    if not isinstance(base, (nn.Linear, SparseDeltaLinear)):
        raise TypeError(
            f"base must be an nn.Linear or a SparseDeltaLinear, got {type(base).__name__}"
        )
    if spec.rank < 1 or not spec.rows:
        raise ValueError(f"spec must have a rank and rows, got rank {spec.rank}, rows {spec.rows}")
    last = 0
    for start, stop in spec.rows:
        if not last <= start < stop <= base.out_features:
            raise ValueError(
                f"rows must be ascending, apart, and within [0, {base.out_features}], "
                f"got {spec.rows}"
            )
        last = stop


def add_to_rows(y: Tensor, updates: list[tuple[slice, Tensor]]) -> Tensor:
    """`y` with updates added to ranges of its last dimension, out of place."""
    pieces, last = [], 0
    for rows, update in updates:
        pieces += [y[..., last : rows.start], y[..., rows] + update]
        last = rows.stop
    pieces.append(y[..., last:])
    pieces = [piece for piece in pieces if piece.shape[-1]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
