"""`apply`: a model and a plan become a tuned model; the one place where modules are replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import head_names
from .errors import BaseModelMismatch
from .layers import (
    AdapterLinear,
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
    attach_parameter,
    detach_parameters,
    is_attached,
    tuned_modules,
)
from .layers.position_index import CheckedIndex, checked_index
from .model_check import check_trainable_itself
from .plan import AdapterSpec, LoraSpec, Plan
from .replaced_head import ReplacedHead


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `apply` leaves on a model as `model.spt_tuning`: all it takes to undo it.

    Attributes:
        plan: what is trained, the head named in it even if `apply` found it by itself.
        base_head: head parameter name -> its values before tuning, copies.
        requires_grad: parameter name -> whether it required a gradient before.
        replaced_head: what stood in the place of a head that a task file brought along.
    """

    plan: Plan
    base_head: Mapping[str, Tensor]
    requires_grad: Mapping[str, bool]
    replaced_head: ReplacedHead = field(default_factory=ReplacedHead)


@torch.inference_mode(False)  # what is made in it could never be trained
def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Tune a model by a plan, in place: replace layers, freeze the rest, leave the head trainable.

    Linear, Conv2d and norm modules give way to their tuned counterparts; any other parameter (a
    token, a table, a layer scale, the weight of a layer with a forward of its own, or of one that
    the model was seen to read instead of calling the layer) is trained where it is. Everything is
    checked before the model is touched.

    Args:
        model: plain, as the plan's sensitivity was measured on; on any device, in fp32, bf16 or
            fp16.
        plan: of `allocate`.

    Returns:
        The model, with a `Tuning` as `model.spt_tuning`.

    Raises:
        ValueError: the model is tuned already, compiled, wrapped, on the meta device or made in
            inference mode; a planned parameter is shared between modules, is
            part of the head, or cannot be tuned as planned.
        BaseModelMismatch: the plan is for another model; names the first difference.
    """
    _check_arguments(model, plan)
    every = list(model.named_parameters(remove_duplicate=False))
    first_names = {id(parameter): name for name, parameter in reversed(every)}
    parameters = {
        name: parameter for name, parameter in every if first_names[id(parameter)] == name
    }
    _check_fits(model, plan, parameters)
    # what was measured of the head, up to all of it, is tuned like anything else
    head = plan.head or tuple(name for name in head_names(model) if name not in plan.info)
    places = _places(model, plan, parameters)
    _check_places(every, places, head, type(model).__name__)

    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        built = {place.name: _build(place) for place in places if not place.in_place}
    except BaseException:
        for name, flag in before.items():
            parameters[name].requires_grad_(flag)
        raise
    base_head = {name: parameters[name].detach().clone() for name in head}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in head)
    for name, module in built.items():
        replace_module(model, name, module)
    for place in places:
        if place.in_place:
            for local, positions in place.positions.items():
                attach_parameter(place.module, local, positions)
    for place in places:
        module = built.get(place.name, place.module)
        for part in (module, getattr(module, "base", None)):
            if part is module or isinstance(part, SparseDeltaLinear):
                part.__dict__["spt_name"] = place.name  # for messages
    model.spt_tuning = Tuning(replace(plan, head=head), base_head, before)  # type: ignore[assignment]
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is, by its full name.

    A module that was tuned in place and is to be replaced by its own `plain` stays the same object
    and gets its own class back.

    Raises:
        ValueError: the name is empty, that is, the model itself would be replaced.
        AttributeError: the model has no module of this name.
    """
    current = model.get_submodule(name)
    if is_attached(current):
        detach_parameters(current)
        return
    parent, _, local = name.rpartition(".")
    if not local:
        raise ValueError(
            f"the model itself is a {type(current).__name__} and cannot be replaced within itself: "
            "wrap it in a Sequential"
        )
    setattr(model.get_submodule(parent), local, module)


@dataclass(frozen=True, eq=False)
class _Place:
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


def _build(place: _Place) -> nn.Module:
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


def _places(model: nn.Module, plan: Plan, parameters: Mapping[str, nn.Parameter]) -> list[_Place]:
    """Every touched module, in the plan's order."""
    modules = dict(model.named_modules())
    found: dict[str, _Place] = {}
    for name, positions in plan.unstructured.items():
        module_name, _, local = name.rpartition(".")
        new = _Place(module_name, modules[module_name], is_read=_is_read(plan, module_name))
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
        place = found.get(module_name, _Place(module_name, module))
        found[module_name] = _Place(module_name, module, place.positions, spec)
    return list(found.values())


def _is_read(plan: Plan, module_name: str) -> bool:
    info = plan.info.get(f"{module_name}.weight" if module_name else "weight")
    return info is not None and info.kind == "functional"


def _check_arguments(model: nn.Module, plan: Plan) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    check_trainable_itself(model, "apply the plan to")
    if hasattr(model, "spt_tuning") or tuned_modules(model):
        raise ValueError(
            "cannot apply twice: the model is tuned already (merge or unload it first)"
        )


def _check_fits(model: nn.Module, plan: Plan, parameters: Mapping[str, nn.Parameter]) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    made_for = f"the plan is for another model ({plan.model_name or 'unnamed'})"
    for name, info in plan.info.items():
        if name not in shapes:
            raise BaseModelMismatch(f"{made_for}: {type(model).__name__} has no parameter {name}")
        if shapes[name] != info.shape:
            raise BaseModelMismatch(
                f"{made_for}: {name}: expected shape {list(info.shape)}, got {list(shapes[name])}"
            )
    for name in plan.head:
        if name not in shapes:
            raise BaseModelMismatch(
                f"{made_for}: {type(model).__name__} has no parameter {name}, of the plan's head"
            )


def _check_places(
    every: list[tuple[str, nn.Parameter]],
    places: list[_Place],
    head: tuple[str, ...],
    model_type: str,
) -> None:
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
