"""`apply`: a model and a plan become a tuned model; the one place where modules are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import BaseModelMismatch
from ..layers import (
    SparseDeltaLinear,
    attach_parameter,
    detach_parameters,
    is_attached,
    tuned_modules,
)
from ..model import head_names
from ..model.buffers import persistent_buffers
from ..model.check import check_trainable_itself
from ..model.replaced_head import ReplacedHead
from ..plan import Plan
from .frozen_base import FrozenBase, watch_state_dicts
from .places import build, check_places, places_of


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `apply` leaves on a model as `model.spt_tuning`: all it takes to undo it.

    Attributes:
        plan: what is trained, the head named in it even if `apply` found it by itself.
        base_head: head parameter name -> its values before tuning, copies.
        requires_grad: parameter name -> whether it required a gradient before.
        replaced_head: what stood in the place of a head that a task file brought along.
        base_buffers: name of a persistent buffer -> its value before tuning, a copy; a forward in
            training mode changes running statistics and their like.
        frozen: what the frozen parameters were; None where there were no values to tell.
        classes: what the task file called the classes.
    """

    plan: Plan
    base_head: Mapping[str, Tensor]
    requires_grad: Mapping[str, bool]
    replaced_head: ReplacedHead = field(default_factory=ReplacedHead)
    base_buffers: Mapping[str, Tensor | None] = field(default_factory=dict)
    frozen: FrozenBase | None = None
    classes: tuple[str, ...] = ()


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
    return apply_to_known(model, plan, {})


@torch.inference_mode(False)
def apply_to_known(model: nn.Module, plan: Plan, digests: Mapping[str, str]) -> nn.Module:
    """`apply`, where the fingerprints of some parameters were just taken, by name."""
    _check_arguments(model, plan)
    every = list(model.named_parameters(remove_duplicate=False))
    first_names = {id(parameter): name for name, parameter in reversed(every)}
    parameters = {
        name: parameter for name, parameter in every if first_names[id(parameter)] == name
    }
    _check_fits(model, plan, parameters)
    # what was measured of the head, up to all of it, is tuned like anything else
    head = plan.head or tuple(name for name in head_names(model) if name not in plan.info)
    places = places_of(model, plan, parameters)
    check_places(every, places, head, type(model).__name__)

    base_head = {name: parameters[name].detach().clone() for name in head}
    buffers = persistent_buffers(model)
    base_buffers = {n: None if b is None else b.detach().clone() for n, b in buffers.items()}
    frozen = _remember({n: p for n, p in parameters.items() if n not in head}, digests)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        built = {place.name: build(place) for place in places if not place.in_place}
    except BaseException:
        for name, flag in before.items():
            parameters[name].requires_grad_(flag)
        raise
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
    model.spt_tuning = Tuning(  # type: ignore[assignment]
        replace(plan, head=head), base_head, before, base_buffers=base_buffers, frozen=frozen
    )
    watch_state_dicts(model)
    return model


def _remember(
    parameters: Mapping[str, nn.Parameter], digests: Mapping[str, str]
) -> FrozenBase | None:
    if any(isinstance(p, FakeTensor) for p in parameters.values()):
        return None  # a rehearsal on tensors without values
    told = {n: p for n, p in parameters.items() if p.element_size() <= 8}  # not complex128
    return FrozenBase.of(told, known={n: digests[n] for n in told.keys() & digests})


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
