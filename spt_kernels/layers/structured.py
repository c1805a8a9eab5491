"""`StructuredLayer`: what LoRA and Adapter share, a frozen base layer under new parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..model import is_pointwise
from ..ops.launching import is_transformed
from .autograd.row_ranges import ranges_of
from .autograd.tuned_conv import TunedConv2d
from .conv import ConvWithDeltas, geometry_of
from .deltas.delta_holder import DeltaHolder
from .deltas.sparse_delta import tag
from .keep_fp32 import keeping_fp32
from .linear import LinearWithDeltas, SparseDeltaLinear
from .sparse_layer import SparseDeltaLayer
from .tuned_class import Shown, share_contents

# Where and in what new parameters are drawn, whatever torch's defaults are
NEW: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class StructuredLayer(SparseDeltaLayer):
    """A frozen layer with a small trained module on it; subclasses add parameters and forward.

    It is of the class of its base layer; sparse deltas of that go on being trained.

    `weight` is that of the base layer, without what is trained on it: there is no one matrix with
    an Adapter. Code that reads a weight instead of calling the layer passes the LoRA or Adapter by;
    for a LoRA `weight + update()` is the whole matrix, which `merge` leaves behind.
    """

    _trained_names: ClassVar[tuple[str, ...]]

    @Shown
    def spec(self) -> Any:
        """What is on the layer."""
        return self.__dict__["_spt_spec"]

    def put_on(self, spec: Any) -> None:
        """Put what `spec` says on this module, which has the contents of its base layer."""
        raise NotImplementedError

    def added_names(self) -> list[str]:
        """Of the deltas, and of the new parameters."""
        return [*super().added_names(), *self._trained_names]

    def extra_repr(self) -> str:
        """Of the base layer; rank and ranges."""
        spec = self.__dict__["_spt_spec"]
        return f"{super().extra_repr()}, rank={spec.rank}, rows={spec.rows}"

    def _start_from(self, base: nn.Module) -> None:
        """Take over what a base layer has, its deltas too, which lead here from now on."""
        share_contents(self, base)
        if isinstance(base, DeltaHolder):
            self.__dict__["_spt_written"] = dict(base._spt_states)
            for delta in self.sparse_deltas().values():
                tag(delta.delta, self, anew=True)

    def _freeze_for(self, spec: Any) -> None:
        """Freeze the base layer, and remember what is on it."""
        self._check_base(self, spec)
        for name in self._trained_names:
            if hasattr(self, name):
                raise ValueError(f"{type(self).__name__} has an attribute {name} of its own")
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.__dict__["_spt_spec"] = spec
        self.__dict__["_spt_ranges"] = ranges_of(spec.rank, spec.rows)

    @classmethod
    def _check_base(cls, base: Any, spec: Any) -> None:
        """Refuse a base layer that this cannot be put on as the spec has it."""
        raise NotImplementedError

    def _move_and_tag(self, device: torch.device) -> None:
        """Put the new parameters on a device.

        They are drawn on the CPU: the same seed gives the same start on every device.
        """
        for parameter in self._new_parameters():
            parameter.data = parameter.data.to(device)
        self._tag_all()

    def _new_parameters(self) -> list[nn.Parameter]:
        return [self._own_parameter(name) for name in self._trained_names]

    def _tag_all(self) -> None:
        """Let everything that is trained lead back to this module."""
        super()._tag_all()
        for parameter in self._new_parameters():
            tag(parameter, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredLayer:
        super()._apply(keeping_fp32(fn, self._new_parameters()), recurse)
        self._tag_all()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        once = f"{prefix}base."  # where the base layer was a submodule
        if "base" not in self._modules and any(key.startswith(once) for key in state_dict):
            state_dict = {
                prefix + key.removeprefix(once) if key.startswith(once) else key: value
                for key, value in state_dict.items()
            }
        super()._load_from_state_dict(state_dict, prefix, *others, **named)
        self._tag_all()  # what was assigned, or swapped in, are other tensors

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tag_all()


class StructuredLinear(StructuredLayer, LinearWithDeltas):
    """A frozen Linear with a small trained module on it."""

    @classmethod
    def _check_base(cls, base: Any, spec: Any) -> None:
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
        _check_rows(spec, base.out_features)

    def _with_deltas(self, x: Tensor) -> Tensor:
        """The base layer's output, of which the deltas are trained."""
        return SparseDeltaLinear.forward(self, x)  # type: ignore[arg-type]


class StructuredConv2d(StructuredLayer, ConvWithDeltas):
    """A frozen 1×1 convolution with a small trained module on it."""

    @classmethod
    def _check_base(cls, base: Any, spec: Any) -> None:
        if not is_pointwise(base):
            got = base if isinstance(base, nn.Conv2d) else type(base).__name__
            raise TypeError(
                f"base must be an nn.Conv2d of 1×1 without groups or padding, got {got}"
            )
        _check_rows(spec, base.out_channels)

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output with what the module makes of it or of the input."""
        if not torch.compiler.is_compiling():
            self.write_stale_deltas()
        if input.dim() == 3:
            return self._of_batch(input[None])[0]
        return self._of_batch(input)

    def _of_batch(self, x: Tensor) -> Tensor:
        """`[batch, out, height, width]`."""
        raise NotImplementedError

    def _base(self, x: Tensor, *lora: Any) -> Tensor:
        """The base layer's output `[batch, out, height, width]`, with a LoRA if one is given."""
        if is_transformed():
            return self._transformed_base(x)
        # the plain convolution would keep its input, for the gradient of a frozen weight
        y: Tensor = TunedConv2d.apply(
            *(x, self.weight, self.bias, *self.trained_tensors(), geometry_of(self)),
            *(lora or (None, None, None)),
        )
        return y

    def _tokens(self, x: Tensor) -> Tensor:
        """What each position of the output sees, `[batch, height, width, in]`, a view."""
        rows, columns = self.stride
        return x[..., ::rows, ::columns].movedim(1, -1)


def _check_rows(spec: Any, out_features: int) -> None:
    if spec.rank < 1 or not spec.rows:
        raise ValueError(f"spec must have a rank and rows, got rank {spec.rank}, rows {spec.rows}")
    last = 0
    for start, stop in spec.rows:
        if not last <= start < stop <= out_features:
            raise ValueError(
                f"rows must be ascending, apart, and within [0, {out_features}], got {spec.rows}"
            )
        last = stop


def rows_of(y: Tensor, rows: slice, dim: int = -1) -> Tensor:
    """A range of a dimension; where it is all of it `y` itself, which has no copy as a gradient."""
    length = rows.stop - rows.start
    return y if length == y.shape[dim] else y.narrow(dim, rows.start, length)


def add_to_rows(y: Tensor, updates: list[tuple[slice, Tensor]], dim: int = -1) -> Tensor:
    """`y` with updates added to ranges of a dimension, out of place."""
    pieces, last = [], 0
    for rows, update in updates:
        pieces += [rows_of(y, slice(last, rows.start), dim), rows_of(y, rows, dim) + update]
        last = rows.stop
    pieces.append(rows_of(y, slice(last, y.shape[dim]), dim))
    pieces = [piece for piece in pieces if piece.shape[dim]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
