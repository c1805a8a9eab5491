"""`apply`: a model and a plan become a tuned model, module by module, each where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import BaseModelMismatch
from ..layers import freeze_layer, tuned_modules, untune
from ..layers.deltas.late_optimizer import mark_frozen, unmark_frozen
from ..model import HeadSource, head_names
from ..model.buffers import copied, persistent_buffers
from ..model.check import check_head_is_float, check_trainable_itself
from ..model.head import matching_head, matching_names
from ..model.quantized import logical_shape, quantized_names
from ..model.replaced_head import ReplacedHead
from ..plan import Plan
from .frozen_base import FrozenBase, watch_state_dicts
from .places import check_places, places_of, untouched_layers
from .whole import is_coarse, train_whole


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
    """Tune a model by a plan, in place: tune layers, freeze the rest, leave the head trainable.

    Every module stays the object that it is and keeps its attributes, methods and hooks; its class
    becomes a subclass of its own. Linear, Conv2d and norm modules find their deltas when they are
    called; any other parameter (a token, a table, a layer scale, the weight of a layer with a
    forward of its own, or of one that the model was seen to read instead of calling the layer) is
    trained wherever it is read; while gradients are recorded its attribute is a view, so that flags
    and values are set on what `named_parameters` gives. Linears and convolutions that the plan
    leaves as they are become `FrozenLinear` and `FrozenConv2d`, for which autograd keeps no more
    than the gradient of their input reads. Everything is checked before the model is touched.

    Args:
        model: plain, as the plan's sensitivity was measured on; on any device, in fp32, bf16 or
            fp16.
        plan: of `allocate`.

    Returns:
        The model, with a `Tuning` as `model.spt_tuning`.

    Raises:
        ValueError: the model is tuned already, compiled, wrapped, on the meta device or made in
            inference mode; a planned parameter is shared between modules, is part of the head, or
            cannot be tuned as planned; one of the head lies in the memory of another.
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
    check_fits(model, plan)
    head, source = _head_of(model, plan, parameters)
    check_head_is_float(head, quantized_names(model))
    coarse = {name for name in head if is_coarse(parameters[name])}
    places = places_of(model, plan, parameters, coarse)
    check_places(every, places, head)

    base_buffers = copied(persistent_buffers(model))
    frozen_base = _remember(model, {n: p for n, p in parameters.items() if n not in head}, digests)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    whole = replace(plan, head=head, head_source=source)
    try:
        for place in places:
            place.tune()
        for layer in untouched_layers(model, [parameters[name] for name in head]):
            freeze_layer(layer)
        base_head = {name: parameters[name].detach().clone() for name in head}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for name in head:
            train_whole(model, name)
    except BaseException:
        for module in tuned_modules(model).values():
            untune(module)
        for name, flag in before.items():
            parameters[name].requires_grad_(flag)
        raise
    model.spt_tuning = Tuning(  # type: ignore[assignment]
        whole, base_head, before, base_buffers=base_buffers, frozen=frozen_base
    )
    watch_state_dicts(model)
    if places or coarse:  # where a head of 32 bits alone is trained, any optimizer trains it
        frozen = {name: p for name, p in parameters.items() if name in coarse or name not in head}
        mark_frozen(frozen.values(), model)
    else:
        unmark_frozen(parameters.values())
    return model


def _remember(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], digests: Mapping[str, str]
) -> FrozenBase | None:
    if any(isinstance(p, FakeTensor) for p in parameters.values()):
        return None  # a rehearsal on tensors without values
    told = {n: p for n, p in parameters.items() if p.element_size() <= 8}  # not complex128
    return FrozenBase.of(model, told, known={n: digests[n] for n in told.keys() & digests})


def _head_of(
    model: nn.Module, plan: Plan, parameters: Mapping[str, nn.Parameter]
) -> tuple[tuple[str, ...], HeadSource]:
    """What the plan has as its head, or where that was left open, what is called one."""
    if plan.head or plan.head_source:
        return matching_head(parameters, plan.head), plan.head_source
    # what was measured of the head, up to all of it, is tuned like anything else
    return tuple(name for name in head_names(model) if name not in plan.info), "names"


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is, by its full name.

    Raises:
        ValueError: the name is empty, that is, the model itself would be replaced.
        AttributeError: the model has no module of this name.
    """
    current = model.get_submodule(name)
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


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        BaseModelMismatch: names the first difference.
    """
    shapes = {name: logical_shape(parameter) for name, parameter in model.named_parameters()}
    made_for = f"the plan is for another model ({plan.model_name or 'unnamed'})"
    for name, info in plan.info.items():
        if name not in shapes:
            raise BaseModelMismatch(f"{made_for}: {type(model).__name__} has no parameter {name}")
        if shapes[name] != info.shape:
            raise BaseModelMismatch(
                f"{made_for}: {name}: expected shape {list(info.shape)}, got {list(shapes[name])}"
            )
    for name in plan.head:
        if not matching_names(shapes, name):
            raise BaseModelMismatch(
                f"{made_for}: {type(model).__name__} has no parameter {name}, of the plan's head"
            )
