"""`LoraLinear`: a low-rank update on a Linear, or on some of its rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .mask_keys import draw_seed
from .row_ranges import groups_of
from .structured import StructuredLinear, add_to_rows, check_base
from .traced_dropout import draw_words
from .traced_lora import LoraTrace, TracedLora, lora_update
from .tuned_linear import LoraCall, TunedLinear, linear_with_lora

if TYPE_CHECKING:
    from ..plan import LoraSpec


class LoraLinear(StructuredLinear):
    """`base(x)` plus `scale · B_i A_i dropout(x)` on each of some ranges of output features.

    The updates are added into the output of the base layer in place; the backward keeps the
    bottleneck and what `SavedInput` says of `x`. The dropout mask is never in memory: it is a hash
    of positions and of a seed, which comes from torch's default CPU generator (a CUDA graph reads
    it from memory: `capture_step` draws it anew for every replay). The published code, too, drops
    elements of the input.

    Attributes:
        weight: of the base layer, frozen; with a sparse delta where that had one.
        lora_a: Parameter `[ranges · rank, in]`, fp32, the down-projections of all ranges stacked.
        lora_b: Parameter `[rows of all ranges, rank]`, fp32, zero at first.
        spec: the `LoraSpec`.

    Args:
        base: `nn.Linear`, or a `SparseDeltaLinear`, whose deltas go on being trained here. Weight
            and bias are shared and frozen.
        spec: rank, ranges, scale and dropout.

    Raises:
        TypeError: `base` is of another type.
        ValueError: the spec is for a layer of other sizes.
    """

    _name_prefix = "Lora"

    _trained_names = ("lora_a", "lora_b")

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        _check(base, spec)
        self._start_from(base)
        self.put_on(spec)

    def put_on(self, spec: LoraSpec) -> None:
        """Put a LoRA on this module, which has the contents of its base layer."""
        _check(self, spec)
        self._freeze_for(spec)
        ranges = self.__dict__["_spt_ranges"]
        self.__dict__["_spt_plain_call"] = LoraCall(groups_of(ranges), spec.scale)
        n_ranges, n_rows = len(spec.rows), sum(stop - start for start, stop in spec.rows)
        self.lora_a = nn.Parameter(torch.empty(n_ranges * spec.rank, self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(n_rows, spec.rank))
        for down in self.lora_a.data.split(spec.rank):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self._move_and_tag(self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output with the updates added."""
        own = self.__dict__
        spec = own["_spt_spec"]
        dropout = spec.dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            return self._traced_forward(input, dropout)
        self.write_stale_deltas()
        call = own["_spt_plain_call"]
        if dropout:
            call = call._replace(dropout=dropout, seed=_seed_for(input))
        weight, bias = self._own_parameters()
        parameters: Any = self._parameters
        lora_a, lora_b = parameters["lora_a"], parameters["lora_b"]
        if not torch.is_grad_enabled():
            return linear_with_lora(input, weight, bias, lora_a, lora_b, call)[0]
        deltas = self.trained_tensors()
        return TunedLinear.apply(input, weight, bias, *deltas, lora_a, lora_b, call)

    def update(self) -> Tensor:
        """`scale · B_i A_i` in its rows, zeros elsewhere: `[out, in]`, fp32; what merging adds."""
        own = self.__dict__
        total = self.lora_a.new_zeros(self.out_features, self.in_features)
        with torch.no_grad():
            for rows, rows_of_b, part in own["_spt_ranges"]:
                total[rows] = own["_spt_spec"].scale * (self.lora_b[rows_of_b] @ self.lora_a[part])
        return total

    def extra_repr(self) -> str:
        """Sizes, rank, ranges, scale and dropout."""
        spec = self.__dict__["_spt_spec"]
        return f"{super().extra_repr()}, scale={spec.scale}, dropout={spec.dropout}"

    def _traced_forward(self, x: Tensor, dropout: float) -> Tensor:
        # The update comes first: what is made again for it must not lie behind the base's product
        own = self.__dict__
        lora = LoraTrace(own["_spt_ranges"], own["_spt_spec"].scale, dropout)
        tensors = x, self.lora_a, self.lora_b, draw_words(x) if dropout else None
        if torch.is_grad_enabled():
            update = TracedLora.apply(*tensors, lora)
        else:
            update, _ = lora_update(*tensors, lora)
        return add_to_rows(self._traced_base(x), [(lora.rows, update)])


def _check(base: Any, spec: LoraSpec) -> None:
    check_base(base, spec)
    if spec.in_features != base.in_features:
        raise ValueError(
            f"spec is for {spec.in_features} input features, base has {base.in_features}"
        )
    if not 0.0 <= spec.dropout <= 1.0:
        raise ValueError(f"dropout must be within [0, 1], got {spec.dropout}")


def _seed_for(x: Tensor) -> int | Tensor:
    return 0 if isinstance(x, FakeTensor) or x.device.type == "meta" else draw_seed()
