"""`LoraLinear` and `LoraConv2d`: a low-rank update on a matrix, or on some of its rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..model.quantized import logical_shape
from ..ops.launching import is_transformed
from .autograd.autocast import without_autocast
from .autograd.card_lora import CardLowRankLinear, dtype_on_card
from .autograd.lora_call import LoraCall
from .autograd.low_rank_linear import LowRankLinear, SmallLowRankLinear, SmallSizes, small_shape
from .autograd.mask_keys import draw_seed
from .autograd.pointwise_lora import PointwiseLora
from .autograd.traced_dropout import draw_words
from .autograd.traced_lora import LoraTrace, TracedLora, lora_update
from .autograd.tuned_linear import TunedLinear, linear_with_lora
from .structured import NEW, StructuredConv2d, StructuredLayer, StructuredLinear, add_to_rows

if TYPE_CHECKING:
    from ..plan import LoraSpec


class LoraLayer(StructuredLayer):
    """What a LoRA is, whatever the layer: its parameters, and what merging adds."""

    _name_prefix = "Lora"

    _trained_names = ("lora_a", "lora_b")

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        self._check_base(base, spec)
        self._start_from(base)
        self.put_on(spec)

    def put_on(self, spec: LoraSpec) -> None:
        """Put a LoRA on this module, which has the contents of its base layer."""
        self._freeze_for(spec)
        ranges = self.__dict__["_spt_ranges"]
        self.__dict__["_spt_plain_call"] = LoraCall.on(ranges, spec.scale)
        n_ranges, n_rows = len(spec.rows), sum(stop - start for start, stop in spec.rows)
        n_columns = logical_shape(self.weight)[1]
        self.lora_a = nn.Parameter(torch.empty(n_ranges * spec.rank, n_columns, **NEW))
        self.lora_b = nn.Parameter(torch.zeros(n_rows, spec.rank, **NEW))
        for down in self.lora_a.data.split(spec.rank):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self._move_and_tag(self.weight.device)

    def update(self) -> Tensor:
        """`scale · B_i A_i` in its rows, zeros elsewhere, which merging adds.

        `[out, in]`, fp32, autocast or not; fp64 on a weight in fp64.
        """
        own = self.__dict__
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.lora_a.new_zeros(logical_shape(self.weight)[:2], dtype=wide)
        with torch.no_grad(), without_autocast(total.device):
            low, up = self.lora_a.to(wide), self.lora_b.to(wide)
            for rows, rows_of_b, part in own["_spt_ranges"]:
                total[rows] = own["_spt_spec"].scale * (up[rows_of_b] @ low[part])
        return total

    def needed_share(self) -> float:
        """All of the input's features, for the down-projections."""
        return 1.0 if self.lora_a.requires_grad else super().needed_share()

    def extra_repr(self) -> str:
        """Sizes, rank, ranges, scale and dropout."""
        spec = self.__dict__["_spt_spec"]
        return f"{super().extra_repr()}, scale={spec.scale}, dropout={spec.dropout}"

    def _this_call(self, x: Tensor) -> LoraCall:
        own = self.__dict__
        call: LoraCall = own["_spt_plain_call"]
        dropout = own["_spt_spec"].dropout if self.training else 0.0
        return call._replace(dropout=dropout, seed=_seed_for(x)) if dropout else call

    def _transformed_updates(self, x: Tensor) -> list[tuple[slice, Tensor]]:
        """The update `[..., rows]` of `x` `[..., in]` in each range of rows, by torch's calls.

        What is dropped is drawn by torch, as `torch.func.vmap` is told to with `randomness`.
        """
        own = self.__dict__
        spec, (lora_a, lora_b) = own["_spt_spec"], self._new_parameters()
        if self.training and spec.dropout:
            x = F.dropout(x, spec.dropout)
        low, up = lora_a.to(x.dtype), lora_b.to(x.dtype)
        return [
            (rows, spec.scale * F.linear(F.linear(x, low[part]), up[rows_of_b]))
            for rows, rows_of_b, part in own["_spt_ranges"]
        ]

    def _traced_update(self, x: Tensor) -> tuple[slice, Tensor]:
        """The update `[..., rows]` of `x` `[..., in]` in code for a compiler, and its rows."""
        own = self.__dict__
        dropout = own["_spt_spec"].dropout if self.training else 0.0
        lora = LoraTrace(own["_spt_ranges"], own["_spt_spec"].scale, dropout)
        tensors = x, self.lora_a, self.lora_b, draw_words(x) if dropout else None
        if torch.is_grad_enabled():
            return lora.rows, TracedLora.apply(*tensors, lora)
        return lora.rows, lora_update(*tensors, lora)[0]


class LoraLinear(LoraLayer, StructuredLinear):
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

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output with the updates added."""
        if is_transformed():
            return add_to_rows(self._transformed_base(input), self._transformed_updates(input))
        if torch.compiler.is_compiling():
            # first the update: what is made again for it must not lie behind the base's product
            update = self._traced_update(input)
            return add_to_rows(self._traced_base(input), [update])
        self.write_stale_deltas()
        own: Any = self.__dict__
        call, parameters = own["_spt_plain_call"], own["_parameters"]
        if self.training and own["_spt_spec"].dropout:
            call = self._this_call(input)
        lora_a, lora_b = parameters.get("lora_a"), parameters.get("lora_b")
        weight, bias = parameters.get("weight"), parameters.get("bias", self)
        if (
            lora_a is not None
            and lora_b is not None
            and lora_a.requires_grad
            and lora_b.requires_grad
            and parameters.get(self._main_delta) is None
            and "bias_delta" not in parameters
            and weight is not None
            and not weight.requires_grad
            and (bias is None or (bias is not self and not bias.requires_grad))
            and torch.is_grad_enabled()
        ):
            factors = input, weight, bias, lora_a, lora_b, call
            sizes = own.get("_spt_small_sizes")
            if sizes is None:
                sizes = own["_spt_small_sizes"] = SmallSizes.of(weight, lora_a, call)
            if call.dropout == 0.0:
                shape = small_shape(sizes, input, weight, lora_a, lora_b)
                if shape is not None:
                    return SmallLowRankLinear.apply(*factors, shape)
            if input.is_cuda:
                dtype = dtype_on_card(call, input, weight, lora_a, lora_b)
                if dtype is not None:
                    return CardLowRankLinear.apply(*factors, dtype)
            return LowRankLinear.apply(*factors)
        weight, bias = self._own_parameters()
        if lora_a is None or lora_b is None:
            lora_a, lora_b = self._new_parameters()  # which says what is gone
        if not torch.is_grad_enabled():
            return linear_with_lora(input, weight, bias, lora_a, lora_b, call)[0]
        deltas = self.trained_tensors()
        return TunedLinear.apply(input, weight, bias, *deltas, lora_a, lora_b, call)

    @classmethod
    def _check_base(cls, base: Any, spec: LoraSpec) -> None:
        super()._check_base(base, spec)
        _check_lora(spec, base.in_features)


class LoraConv2d(LoraLayer, StructuredConv2d):
    """`LoraLinear` on the channels of each position: a LoRA on a 1×1 convolution of any stride.

    What it holds is as there, with channels for features; `update` is `[out, in]`.

    Args:
        base: `nn.Conv2d` with a 1×1 kernel, without groups and padding, or a `SparseDeltaConv2d`.
        spec: rank, ranges, scale and dropout.

    Raises:
        TypeError: `base` is something else.
        ValueError: the spec is for a layer of other sizes.
    """

    def _of_batch(self, x: Tensor) -> Tensor:
        if is_transformed():
            updates = self._transformed_updates(self._tokens(x))
        elif torch.compiler.is_compiling():
            updates = [self._traced_update(self._tokens(x))]
        else:
            lora = PointwiseLora(self.__dict__["_spt_ranges"], self._this_call(x))
            return self._base(x, *self._new_parameters(), lora)
        moved = [(rows, update.movedim(-1, 1)) for rows, update in updates]
        return add_to_rows(self._base(x), moved, 1)

    @classmethod
    def _check_base(cls, base: Any, spec: LoraSpec) -> None:
        super()._check_base(base, spec)
        _check_lora(spec, base.in_channels)


def _check_lora(spec: LoraSpec, in_features: int) -> None:
    """Refuse a spec that is no LoRA for so many input features."""
    if spec.in_features != in_features:
        raise ValueError(f"spec is for {spec.in_features} input features, base has {in_features}")
    if not 0.0 <= spec.dropout <= 1.0:
        raise ValueError(f"dropout must be within [0, 1], got {spec.dropout}")


def _seed_for(x: Tensor) -> int | Tensor:
    return 0 if isinstance(x, FakeTensor) or x.device.type == "meta" else draw_seed()
