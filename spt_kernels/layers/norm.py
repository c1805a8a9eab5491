"""`SparseDeltaNorm`: a norm of which a few weights and biases are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta_holder import DeltaHolder
from .parameter import attached
from .plain_module import keep_plain
from .position_index import CheckedIndex


class SparseDeltaNorm(DeltaHolder):
    """A frozen norm plus sparse deltas of weight and bias; the forward is that of the plain one.

    Any module without submodules will do that reads its parameters in its forward: LayerNorm,
    timm's LayerNorm2d, RMSNorm, GroupNorm, BatchNorm2d. Its other attributes (`eps`,
    `normalized_shape`, ...) can be read here too.

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
            such parameter, or has submodules.
    """

    def __init__(
        self,
        norm: nn.Module,
        weight_index: Tensor | CheckedIndex | None = None,
        bias_index: Tensor | CheckedIndex | None = None,
    ) -> None:
        super().__init__()
        if next(norm.children(), None) is not None:
            raise ValueError(f"norm must have no submodules, got {type(norm).__name__}")
        keep_plain(self, norm)
        for parameter in norm.parameters():
            parameter.requires_grad_(False)
        for local, index in (("weight", weight_index), ("bias", bias_index)):
            if local not in self._parameters:
                self.register_parameter(local, None)
            if index is not None:
                self.hold_delta(local, index, f"{local}_index")
        for name, value in vars(norm).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """What the plain norm returns."""
        if not torch.compiler.is_compiling():
            self.write_stale_deltas()
        plain = self.__dict__["_spt_plain"]
        weight, bias = attached(self, "weight"), attached(self, "bias")
        if type(plain).forward is nn.LayerNorm.forward:
            return F.layer_norm(x, plain.normalized_shape, weight, bias, plain.eps)
        plain.training = self.training
        tensors = {**self._parameters, **self._buffers, "weight": weight, "bias": bias}
        own = {name: tensors[name] for name in (*plain._parameters, *plain._buffers)}
        used = {name: tensor for name, tensor in own.items() if tensor is not None}
        return torch.func.functional_call(plain, used, (x,))

    def extra_repr(self) -> str:
        """The plain norm and the numbers of trained entries."""
        trained = ", ".join(
            f"{local}_nnz={delta.delta.numel()}" for local, delta in self.sparse_deltas().items()
        )
        return f"{type(self.__dict__['_spt_plain']).__name__}({self.plain.extra_repr()}), {trained}"
