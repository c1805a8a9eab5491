"""Which modules a plan touches, and what comes into the place of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    AdapterLinear,
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
)
from ..layers.position_index import CheckedIndex, checked_index
from ..plan import AdapterSpec, LoraSpec, Plan


@dataclass(frozen=True, eq=False)
class Place:
    """A module that the plan touches.

    Attributes:
        name: of the module.
        module: as it is.
        positions: local parameter name -> positions, on the parameter's device, checked.
        spec: of the structured module on its weight, if any.
        is_read: whether the model reads its weight itself, as BEiT and Swin V2 do with `qkv`.
    """

    name: str
    module: nn.Module
    positions: dict[str, CheckedIndex] = field(default_factory=dict)
    spec: LoraSpec | AdapterSpec | None = None
    is_read: bool = False

    @property
    def in_place(self) -> bool:
        """Whether its parameters are tuned where they are: no tuned module stands for it."""
        module = self.module
        return self.is_read or not (_is_linear(module) or _is_conv2d(module) or _is_norm(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and _runs_plainly(module, nn.Linear)


def _is_conv2d(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and _runs_plainly(module, nn.Conv2d)
        and type(module)._conv_forward is nn.Conv2d._conv_forward
    )


def _runs_plainly(module: nn.Module, base: Any) -> bool:
    # A subclass with a forward of its own (weight standardisation, ...) computes something else.
    # timm's Linear only adds a cast under TorchScript. The attention of torch never calls the
    # forward of its output projection.
    kind = type(module)
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return False
    of_timm = base is nn.Linear and f"{kind.__module__}.{kind.__name__}" == _TIMM_LINEAR
    return kind.forward is base.forward or of_timm


_TIMM_LINEAR = "timm.layers.linear.Linear"


def _is_norm(module: nn.Module) -> bool:
    named = isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
    is_leaf = next(module.children(), None) is None
    return named and is_leaf and module._parameters.keys() <= {"weight", "bias"}


def build(place: Place) -> nn.Module:
    """The tuned module that stands for the plain one; its freshly frozen weights are the same."""
    module, positions = place.module, place.positions
    if _is_norm(module):
        return SparseDeltaNorm(module, positions.get("weight"), positions.get("bias"))
    weight: Tensor = module.weight  # type: ignore[assignment]
    nothing = torch.empty(0, dtype=torch.int32, device=weight.device)
    index = positions.get("weight", CheckedIndex(nothing, weight))
    if isinstance(module, nn.Conv2d):
        return SparseDeltaConv2d(module, index, positions.get("bias"))
    assert isinstance(module, nn.Linear)
    base = SparseDeltaLinear(module, index, positions.get("bias")) if positions else module
    if isinstance(place.spec, LoraSpec):
        return LoraLinear(base, place.spec)
    return base if place.spec is None else AdapterLinear(base, place.spec)


def places_of(model: nn.Module, plan: Plan, parameters: Mapping[str, nn.Parameter]) -> list[Place]:
    """Every touched module, in the plan's order."""
    modules = dict(model.named_modules())
    found: dict[str, Place] = {}
    for name, positions in plan.unstructured.items():
        module_name, _, local = name.rpartition(".")
        new = Place(module_name, modules[module_name], is_read=_is_read(plan, module_name))
        place = found.setdefault(module_name, new)
        on_device = positions.to(parameters[name].device)
        place.positions[local] = checked_index(
            f"plan.unstructured[{name!r}]", on_device, name, parameters[name]
        )
    for name, spec in plan.structured.items():
        module_name, _, local = name.rpartition(".")
        module = modules[module_name]
        if local != "weight" or not _is_linear(module):
            raise ValueError(
                f"{name} cannot take a LoRA or an Adapter: expected the weight of a plain "
                f"nn.Linear, got a {type(module).__name__}; leave it out with exclude=... in "
                "measure_sensitivity"
            )
        place = found.get(module_name, Place(module_name, module))
        found[module_name] = Place(module_name, module, place.positions, spec)
    return list(found.values())


def _is_read(plan: Plan, module_name: str) -> bool:
    info = plan.info.get(f"{module_name}.weight" if module_name else "weight")
    return info is not None and info.kind == "functional"


def check_places(
    every: list[tuple[str, nn.Parameter]],
    places: list[Place],
    head: tuple[str, ...],
    model_type: str,
) -> None:
    """Raise unless each touched parameter has one place, outside of the head, and can be tuned."""
    times = Counter(id(parameter) for _, parameter in every)
    for place in places:
        touched = {*place.positions, *(["weight"] if place.spec else [])}
        for local in sorted(touched):
            name = f"{place.name}.{local}" if place.name else local
            parameter = place.module._parameters[local]
            assert parameter is not None
            if times[id(parameter)] > 1:
                others = [other for other, p in every if p is parameter and other != name]
                raise ValueError(f"{name} is shared with {others[0]}: tied weights cannot be tuned")
            if name in head:
                raise ValueError(f"{name} is part of the head, which is trained as a whole")
            if local not in place.positions:
                nothing = torch.empty(0, dtype=torch.int32, device=parameter.device)
                checked_index(f"plan.structured[{name!r}]", nothing, name, parameter)
        if place.name == "" and not place.in_place:
            raise ValueError(
                f"the model itself is a {model_type}: wrap it in a Sequential to tune it"
            )
