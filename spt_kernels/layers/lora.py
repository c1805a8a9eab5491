"""`LoraLinear`: a low-rank update on a Linear, or on some of its rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .linear import SparseDeltaLinear
from .mask_keys import draw_seed
from .row_ranges import groups_of
from .structured import StructuredLinear, add_to_rows, check_base
from .traced_dropout import draw_words
from .traced_lora import LoraTrace, TracedLora, lora_update
from .tuned_linear import LoraCall, TunedLinear, linear_with_lora

if TYPE_CHECKING:
    from ..plan import LoraSpec

_NO_DELTAS = (None, None, None, None)


class LoraLinear(StructuredLinear):
    """`base(x)` plus `scale · B_i A_i dropout(x)` on each of some ranges of output features.

    The updates are added into the output of the base layer in place; the backward keeps the
    bottleneck and what `SavedInput` says of `x`. The dropout mask is never in memory: it is a hash
    of positions and of a seed, which comes from torch's default CPU generator (a CUDA graph reads
    it from memory: `capture_step` draws it anew for every replay). The published code, too, drops
    elements of the input.

    Attributes:
        base: the frozen layer; a `SparseDeltaLinear` keeps training its deltas.
        lora_a: Parameter `[ranges · rank, in]`, fp32, the down-projections of all ranges stacked.
        lora_b: Parameter `[rows of all ranges, rank]`, fp32, zero at first.
        spec: the `LoraSpec`.

    Args:
        base: `nn.Linear` or `SparseDeltaLinear`. Its weight and bias are frozen.
        spec: rank, ranges, scale and dropout.

    Raises:
        TypeError: `base` is of another type.
        ValueError: the spec is for a layer of other sizes.
    """

    def __init__(self, base: nn.Linear | SparseDeltaLinear, spec: LoraSpec) -> None:
        super().__init__()
        check_base(base, spec)
        if spec.in_features != base.in_features:
            raise ValueError(
                f"spec is for {spec.in_features} input features, base has {base.in_features}"
            )
        if not 0.0 <= spec.dropout <= 1.0:
            raise ValueError(f"dropout must be within [0, 1], got {spec.dropout}")
        self._put_on(base, spec)
        self._groups = groups_of(self._ranges)
        device, n_ranges = base.weight.device, len(spec.rows)
        n_rows = sum(stop - start for start, stop in spec.rows)
        self.lora_a = nn.Parameter(torch.empty(n_ranges * spec.rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(n_rows, spec.rank))
        for down in self.lora_a.data.split(spec.rank):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self._move_and_tag(device)

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with the updates added."""
        dropout = self.spec.dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            return self._traced_forward(x, dropout)
        self.__dict__["_spt_called"] = True
        deltas: tuple[Any, ...] = _NO_DELTAS
        if isinstance(self.base, SparseDeltaLinear):
            self.base.write_stale_deltas()
            deltas = self.base.trained_tensors()
        seed = _seed_for(x) if dropout else 0
        call = LoraCall(self._groups, self.spec.scale, dropout, seed)
        weight, bias = self.base.weight, self.base.bias
        if not torch.is_grad_enabled():
            return linear_with_lora(x, weight, bias, self.lora_a, self.lora_b, call)[0]
        return TunedLinear.apply(x, weight, bias, *deltas, self.lora_a, self.lora_b, call)

    def update(self) -> Tensor:
        """`scale · B_i A_i` in its rows, zeros elsewhere: `[out, in]`, fp32; what merging adds."""
        total = self.lora_a.new_zeros(self.out_features, self.in_features)
        with torch.no_grad():
            for rows, rows_of_b, part in self._ranges:
                total[rows] = self.spec.scale * (self.lora_b[rows_of_b] @ self.lora_a[part])
        return total

    def extra_repr(self) -> str:
        """Sizes, rank, ranges, scale and dropout."""
        return f"{super().extra_repr()}, scale={self.spec.scale}, dropout={self.spec.dropout}"

    def _traced_forward(self, x: Tensor, dropout: float) -> Tensor:
        # The update comes first: what is made again for it must not lie behind the base's product
        lora = LoraTrace(self._ranges, self.spec.scale, dropout)
        tensors = x, self.lora_a, self.lora_b, draw_words(x) if dropout else None
        if torch.is_grad_enabled():
            update = TracedLora.apply(*tensors, lora)
        else:
            update, _ = lora_update(*tensors, lora)
        return add_to_rows(self._traced_base(x), [(lora.rows, update)])


def _seed_for(x: Tensor) -> int | Tensor:
    return 0 if isinstance(x, FakeTensor) or x.device.type == "meta" else draw_seed()
