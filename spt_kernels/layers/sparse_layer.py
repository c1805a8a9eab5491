"""`SparseDeltaLayer`: what a tuned Linear and a tuned Conv2d share, all but the forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .delta_holder import DeltaHolder
from .plain_module import keep_plain
from .position_index import CheckedIndex, checked_index


class SparseDeltaLayer(DeltaHolder):
    """A frozen layer plus a sparse delta of its weight and, if asked for, one of its bias.

    A subclass keeps as `_spt_pattern` what its backward needs of the index.

    Args:
        plain: the layer to tune. Its parameters are shared and frozen.
        index: int32 or int64 `[nnz]`, sorted flat positions in `plain.weight`; may be empty.
        bias_index: the same for `plain.bias`; None leaves all of it frozen.
    """

    weight: Tensor
    bias: Tensor | None
    delta: nn.Parameter
    index: Tensor
    original: Tensor

    _main_parameter = "weight"

    def __init__(
        self,
        plain: nn.Linear | nn.Conv2d,
        index: Tensor | CheckedIndex,
        bias_index: Tensor | CheckedIndex | None,
    ) -> None:
        super().__init__()
        index = checked_index("index", index, "weight", plain.weight)
        if bias_index is not None and plain.bias is not None:
            bias_index = checked_index("bias_index", bias_index, "bias", plain.bias)
        keep_plain(self, plain)
        self.hold_delta("weight", index)
        if bias_index is not None:
            self.hold_delta("bias", bias_index, "bias_index")
        elif plain.bias is not None:
            plain.bias.requires_grad_(False)

    def has_gradients(self) -> bool:
        """Whether a backward through this layer has anything to make for its deltas."""
        return any(
            delta is not None and delta.requires_grad and delta.numel() > 0
            for delta in (self._parameters["delta"], self._parameters.get("bias_delta"))
        )

    def trained_tensors(self) -> tuple[Any, ...]:
        """Delta, its pattern, bias delta and bias index, as the autograd functions take them."""
        return (
            self.delta if self.delta.numel() else None,
            self.__dict__["_spt_pattern"],
            self._parameters.get("bias_delta"),
            getattr(self, "bias_index", None),
        )

    def extra_repr(self) -> str:
        """The plain layer's sizes and the numbers of trained entries."""
        bias_delta = self._parameters.get("bias_delta")
        trained = "" if bias_delta is None else f", bias_nnz={bias_delta.numel()}"
        return f"{self.plain.extra_repr()}, nnz={self.delta.numel()}{trained}"
