"""`HeldModel`: what captured work reads of a model by address, and whether it still is there."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from ..layers.deltas.delta_holder import DeltaHolder

_TRAINED = attrgetter("requires_grad")


class HeldModel:
    """A model's modules and their mode, its tensors and which are trained, when it is made."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._modes = [module.training for module in self._modules]
        self._names: list[str] = []
        self._places: list[dict[str, Any]] = []  # with `_keys`, where each of `_values` was found
        self._keys: list[str] = []
        self._values: list[Any] = []
        for name, module in model.named_modules():
            own: list[dict[str, Any]] = [module._modules, module._parameters, module._buffers]
            for place in own:
                self._hold(name, place, list(place))
            if isinstance(module, DeltaHolder):
                self._hold(name, vars(module), [*module._constants(), "_spt_pattern"])
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._trained = list(map(_TRAINED, self._tensors))
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def _hold(self, name: str, place: dict[str, Any], keys: list[str]) -> None:
        for key in keys:
            if place.get(key) is not None:
                self._names.append(f"{name}.{key}" if name else key)
                self._places.append(place)
                self._keys.append(key)
                self._values.append(place[key])

    def difference(self) -> str | None:
        """What is another than it was, None if nothing is."""
        if not all(map(is_, map(dict.get, self._places, self._keys), self._values)):
            for name, place, key, value in zip(
                self._names, self._places, self._keys, self._values, strict=True
            ):
                if place.get(key) is not value:
                    return f"{name} was replaced"
        if [tensor.data_ptr() for tensor in self._tensors] != self._addresses:
            return "a parameter or buffer was moved or given other memory"
        if list(map(_TRAINED, self._tensors)) != self._trained:
            for tensor, is_trained in zip(self._tensors, self._trained, strict=True):
                if tensor.requires_grad != is_trained:
                    n = next(n for n, value in enumerate(self._values) if value is tensor)
                    one = "a" if is_trained else "no"
                    return f"{self._names[n]} required {one} gradient when it was captured"
        if [module.training for module in self._modules] != self._modes:
            was = "training" if self._modes[0] else "evaluation"
            return f"it was in {was} mode when the step was captured, and is not, or a part of it"
        return None
