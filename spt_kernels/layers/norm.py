"""`SparseDeltaNorm`: a norm of which a few weights and biases are trained."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dtypes import FLOATS
from ..ops.launching import goes_as_on_card, is_transformed
from .autograd.autocast import is_any_autocast_on
from .autograd.card_norm import CardLayerNorm, NormCall
from .deltas.delta_holder import DeltaHolder
from .deltas.position_index import CheckedIndex, checked_index
from .deltas.sparse_delta import SparseDelta, tag
from .in_place import tune_in_place
from .parameter import attached
from .sync_norm import follow_conversions
from .tuned_class import plain_class, share_contents, tuned_class

# The norms whose forwards run in this thread, the innermost first: a norm, its parameters connected
# to their deltas, and the norms around it. Another thread may call the same norm meanwhile.
_Running = tuple[nn.Module, dict[str, Any], "_Running | None"]
_RUNNING: ContextVar[_Running | None] = ContextVar("spt_running_norms", default=None)


class SparseDeltaNorm(DeltaHolder):
    """A frozen norm plus sparse deltas of weight and bias; its forward is its own.

    Any module will do that reads its parameters in its forward, whatever the arguments of that:
    LayerNorm, timm's LayerNorm2d, RMSNorm, GroupNorm, BatchNorm2d, a conditional norm. The result
    is of a subclass of this class and of the norm's.

    Attributes:
        weight: frozen, holds base + delta.
        bias: the same, or None.
        weight_delta: Parameter `[nnz]`, fp32, with constants `weight_index` and `weight_original`;
            likewise for the bias; each only if its index was given.

    Args:
        norm: the module to tune. Its parameters are shared and frozen.
        weight_index: int32 or int64 `[nnz]`, sorted positions in `norm.weight`; None freezes it.
        bias_index: the same for `norm.bias`.

    Raises:
        TypeError: an index is no int32 or int64 tensor.
        ValueError: positions unsorted, repeated, out of range or on another device; the norm has no
            such parameter.
    """

    _name_prefix = "SparseDelta"

    def __new__(cls, norm: Any = None, *indices: Any, **named: Any) -> Any:
        """An empty module, of a subclass of the norm's class."""
        if not isinstance(norm, nn.Module):
            return super().__new__(cls)
        given = {**dict(zip(("weight_index", "bias_index"), indices, strict=False)), **named}
        reads = tuple(n.removesuffix("_index") for n, index in given.items() if index is not None)
        return object.__new__(tuned_class(norm_tuner(norm), norm, reads))

    def __init__(
        self,
        norm: nn.Module,
        weight_index: Tensor | CheckedIndex | None = None,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        if not isinstance(norm, nn.Module):
            raise TypeError(f"norm must be an nn.Module, got {type(norm).__name__}")
        share_contents(self, norm)
        given = {"weight": weight_index, "bias": bias_index}
        self._hold({local: index for local, index in given.items() if index is not None})

    @staticmethod
    def reader(name: str) -> property:
        """Within a forward the parameter connected to its delta, elsewhere the parameter itself."""

        def read(module: DeltaHolder) -> Tensor | None:
            if torch.compiler.is_compiling():
                return attached(module, name)
            running = _RUNNING.get()
            while running is not None:
                norm, connected, running = running
                if norm is module:
                    return connected[name]  # type: ignore[no-any-return]
            return module._parameters[name]

        return property(read)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the plain norm returns."""
        forward = super().forward
        if torch.compiler.is_compiling():
            return forward(*inputs, **named)
        self.write_stale_deltas()
        connected = {local: attached(self, local) for local in type(self)._spt_reads}  # type: ignore[attr-defined]
        token = _RUNNING.set((self, connected, _RUNNING.get()))
        try:
            return forward(*inputs, **named)
        finally:
            _RUNNING.reset(token)

    def extra_repr(self) -> str:
        """Of the plain norm, and the numbers of trained entries."""
        trained = [f"{n}_nnz={delta.delta.numel()}" for n, delta in self.sparse_deltas().items()]
        return ", ".join(filter(None, [super().extra_repr(), *trained]))

    def _tag(self, delta: SparseDelta) -> None:
        """Let a delta lead back to this module, and the parameter that it belongs to."""
        super()._tag(delta)
        tag(delta.target, self)
        follow_conversions()

    def _hold(self, positions: Mapping[str, Tensor | CheckedIndex]) -> None:
        checked = {}
        for local, index in positions.items():
            target, name = self._parameters.get(local), f"{local}_index"
            if target is None:
                kind = plain_class(self).__name__
                raise ValueError(f"{name} was given, but the {kind} has no {local}")
            checked[local] = checked_index(name, index, local, target)
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        for local, found in checked.items():
            self.hold_delta(local, found, f"{local}_index")


class SparseDeltaLayerNorm(SparseDeltaNorm):
    """The same for norms that compute what `nn.LayerNorm` does, as timm's: called at once."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the plain norm returns."""
        own: Any = self
        if len(inputs) != 1 or named or self.__dict__.get("_fast_norm"):  # timm's, by another call
            return super().forward(*inputs, **named)
        (input,) = inputs
        if not torch.compiler.is_compiling() and goes_as_on_card(input):
            entries = self._entries_alone(input)
            if entries is not None:
                self.write_stale_deltas()
                weight, bias = self._parameters["weight"], self._parameters["bias"]
                (weight_delta, weight_index), (bias_delta, bias_index) = entries
                call = NormCall(own.normalized_shape, own.eps, weight_index, bias_index)
                return CardLayerNorm.apply(input, weight, bias, weight_delta, bias_delta, call)
        weight, bias = affine_of(own)
        return F.layer_norm(input, own.normalized_shape, weight, bias, own.eps)

    def _entries_alone(self, input: Tensor) -> list[tuple[Tensor | None, Tensor | None]] | None:
        """Deltas of weight and bias, each with its positions; None if not for `CardLayerNorm`."""
        dtype = input.dtype
        if (
            dtype not in FLOATS
            or (dtype is not torch.float32 and is_any_autocast_on())  # which computes it in fp32
            or not torch.is_grad_enabled()
            or is_transformed()
        ):
            return None
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for local in ("weight", "bias"):
            parameter, state = self._parameters.get(local), self._spt_states.get(local)
            if parameter is None:
                if state is not None or local not in self._parameters:
                    return None
            elif parameter.dtype is not dtype or parameter.requires_grad:
                return None
            if state is None:
                found.append((None, None))
                continue
            delta = self._parameters.get(state.name)
            if state.index_name is None or state.is_sharded:  # trained whole, or in parts
                return None
            if delta is None or not delta.requires_grad:
                return None
            found.append((delta, self.__dict__[state.index_name]))
        return found if any(delta is not None for delta, _ in found) else None


def affine_of(norm: nn.Module) -> tuple[Any, Any]:
    """Weight and bias as a norm's forward reads them: up to date, connected to their deltas."""
    if not isinstance(norm, SparseDeltaNorm):
        return norm.weight, norm.bias
    if not torch.compiler.is_compiling():
        norm.write_stale_deltas()
    own = norm._parameters  # without what is made of others whenever it is read, as by pruning
    weight = attached(norm, "weight") if "weight" in own else norm.weight
    return weight, attached(norm, "bias") if "bias" in own else norm.bias


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module computes what `nn.LayerNorm` does."""
    if not isinstance(module, nn.LayerNorm):
        return False
    kind = plain_class(module)
    is_timms = f"{kind.__module__}.{kind.__name__}" == "timm.layers.norm.LayerNorm"
    return is_timms or kind.forward is nn.LayerNorm.forward


def norm_tuner(norm: nn.Module) -> type[SparseDeltaNorm]:
    """The class that tunes a norm of this kind."""
    return SparseDeltaLayerNorm if is_layer_norm(norm) else SparseDeltaNorm


def tune_norm(norm: nn.Module, positions: Mapping[str, Tensor | CheckedIndex]) -> None:
    """Train a few entries of a norm's parameters, in place.

    Args:
        norm: plain.
        positions: name of a parameter in it -> see `SparseDeltaNorm`.
    """
    tune_in_place(norm, norm_tuner(norm), lambda own: own._hold(positions), tuple(positions))
