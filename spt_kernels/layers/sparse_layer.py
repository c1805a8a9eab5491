"""`SparseDeltaLayer`: what a tuned Linear and a tuned Conv2d share, all but the forward."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .deltas.delta_holder import DeltaHolder
from .deltas.position_index import CheckedIndex, checked_index
from .tuned_class import plain_class, tuned_class


class SparseDeltaLayer(DeltaHolder):
    """A frozen layer plus a sparse delta of its weight and, if asked for, one of its bias.

    A subclass keeps as `_spt_pattern` what its backward needs of the index.
    """

    weight: Tensor
    bias: Any  # a Tensor or None
    delta: nn.Parameter
    index: Tensor
    original: Tensor

    _main_parameter = "weight"
    _main_delta: ClassVar[str] = "delta"

    def __new__(cls, plain: Any = None, *_: Any, **named: Any) -> Any:
        """An empty module, of a subclass if `plain` is of one."""
        given = [each for each in (plain, *named.values()) if isinstance(each, nn.Module)]
        if not given or cls._plain_class is None or not isinstance(given[0], cls._plain_class):
            return super().__new__(cls)  # unpickled, or about to be refused
        return object.__new__(tuned_class(cls, given[0]))

    def _hold(self, index: Tensor | CheckedIndex, bias_index: Tensor | CheckedIndex | None) -> None:
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        assert weight is not None
        index = checked_index("index", index, "weight", weight)
        if bias_index is not None and bias is not None:
            bias_index = checked_index("bias_index", bias_index, "bias", bias)
        elif bias_index is not None:
            kind = plain_class(self).__name__
            raise ValueError(f"bias_index was given, but the {kind} has no bias")
        self.hold_delta("weight", index)
        if bias_index is not None:
            self.hold_delta("bias", bias_index, "bias_index")
        elif bias is not None:
            bias.requires_grad_(False)
        self._index_changed()

    def _traced_weight(self) -> Tensor:
        """The weight, base + delta, in code for a compiler."""
        return self.weight

    def _own_parameters(self) -> tuple[Any, Any]:
        """Weight and bias; the way through the module costs as much as all else of a call."""
        parameters = self._parameters
        if "weight" in parameters and "bias" in parameters:
            return parameters["weight"], parameters["bias"]
        return self.weight, self.bias  # an attribute, if one is computed

    def has_gradients(self) -> bool:
        """Whether a backward through this layer has anything to make for its deltas."""
        parameters = self._parameters
        delta, bias_delta = parameters.get(self._main_delta), parameters.get("bias_delta")
        trained = delta is not None and delta.requires_grad
        return trained or (bias_delta is not None and bias_delta.requires_grad)

    def needed_share(self) -> float:
        """Share of the input's features that a backward needs for what is trained here, 0 to 1."""
        weight = self._parameters.get("weight")
        if weight is not None and weight.requires_grad:  # made trainable after it was tuned
            return 1.0
        delta, pattern = self._parameters.get(self._main_delta), self.__dict__.get("_spt_pattern")
        if delta is None or not delta.requires_grad:
            return 0.0
        return 1.0 if pattern is None else pattern.input_share  # type: ignore[no-any-return]

    def trained_tensors(self) -> tuple[Any, ...]:
        """Delta, its pattern, bias delta and bias index, as the autograd functions take them."""
        parameters, own = self._parameters, self.__dict__
        return (
            parameters.get(self._main_delta),
            own.get("_spt_pattern"),
            parameters.get("bias_delta"),
            own.get("bias_index"),
        )

    def extra_repr(self) -> str:
        """The plain layer's sizes and the numbers of trained entries."""
        held = {local: delta.delta.numel() for local, delta in self.sparse_deltas().items()}
        names = {"weight": "nnz", "bias": "bias_nnz"}
        trained = [f"{names[local]}={held[local]}" for local in names if local in held]
        return ", ".join([super().extra_repr(), *trained])


def is_trained_whole(weight: Any, bias: Any) -> bool:
    """Whether a weight or a bias requires a gradient itself, as what was made trainable does."""
    return weight.requires_grad or (bias is not None and bias.requires_grad)
