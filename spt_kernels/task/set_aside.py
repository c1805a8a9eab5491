"""A task taken off a model for a while: the base bit for bit, then the very task again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import LoraLayer, SetAside, put_back, set_aside, write_deltas
from ..model.buffers import copied
from ..model.replaced_head import name_classes, put_heads
from ..tuning import Tuning, watch_state_dicts
from .base_model import BaseModel
from .forward_state import set_buffers
from .intact import dense_names, drop_problem, merge_problem, tuning_of
from .transfer import fold, forget, restore_whole


@dataclass(frozen=True, eq=False)
class TaskAside:
    """What a model was tuned by; its trained parameters are the same when it is put back.

    Attributes:
        tuning: as `apply` or `load_delta` left it.
        modules: name of a tuned module -> what made it one.
        dense: name -> values of a parameter that was trained whole.
        gradients: name -> gradient of such a parameter, which is the base's as well: it must reach
            neither the base nor what another task makes of the parameter.
        buffers: name -> buffer.
        requires_grad: name -> whether a parameter of the base required a gradient.
        heads: name -> the task's own module, where it stood in the place of the model's.
    """

    tuning: Tuning
    modules: Mapping[str, SetAside]
    dense: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor | None]
    requires_grad: Mapping[str, bool]
    heads: Mapping[str, nn.Module]


@torch.inference_mode(False)  # what is made in it could never be trained
@torch.no_grad()
def take_aside(model: nn.Module) -> TaskAside:
    """Make a tuned model plain, as `unload` does, and return what it takes to undo that.

    Unlike a task file this keeps the parameters themselves, so that an optimizer stays valid.

    Raises:
        ValueError: the model is not tuned, or no longer as `apply` made it; it is as it was.
    """
    if not hasattr(model, "spt_tuning"):
        raise ValueError("cannot take the task off: the model is not tuned, or no longer")
    now = BaseModel.of(model)
    problem = drop_problem(model, now)
    if problem is not None:
        raise ValueError(f"cannot take the task off: {problem}")
    tuning = tuning_of(model)
    flags = {name: p.requires_grad for name, p in now.parameters.items()}
    names = dense_names(model, now)
    buffers = copied(now.buffers)
    heads = {name: model.get_submodule(name) for name in tuning.replaced_head.modules}
    modules = {name: set_aside(module) for name, module in now.tuned.items()}
    dense = {name: now.parameters[name].detach().clone() for name in names}
    gradients = {name: now.parameters[name].grad for name in names}
    for name in names:
        now.parameters[name].grad = None
    set_buffers(now, tuning.base_buffers)
    forget(model, now)
    restore_whole(model, now, tuning)
    return TaskAside(tuning, modules, dense, gradients, buffers, flags, heads)


@torch.inference_mode(False)
@torch.no_grad()
def put_task_back(model: nn.Module, aside: TaskAside) -> None:
    """Tune a plain model as it was tuned before it was taken aside, to the bit.

    Args:
        model: the same one; it may have been moved or cast since.
        aside: used up by this.
    """
    put_heads(model, aside.heads)
    for name, module in aside.modules.items():
        put_back(model.get_submodule(name), module)
    now = BaseModel.of(model)
    for name, values in aside.dense.items():
        parameter, gradient = now.parameters[name], aside.gradients[name]
        parameter.copy_(values)
        parameter.grad = None if gradient is None else gradient.to(parameter)
    set_buffers(now, aside.buffers)
    for name, flag in aside.requires_grad.items():
        now.parameters[name].requires_grad_(flag)
    tuning = aside.tuning
    head = {name: now.parameters[name] for name in tuning.plan.head}
    said = name_classes(model, tuning.replaced_head, head, tuning.classes)
    model.spt_tuning = replace(tuning, replaced_head=said)  # type: ignore[assignment]
    watch_state_dicts(model)
    torch.clear_autocast_cache()  # of casts of what was there before


@dataclass(frozen=True, eq=False)
class MergedTask:
    """A task that is folded into the weights of a plain model, from which it can be taken again.

    Attributes:
        aside: the task.
        base: name -> base values of each parameter that holds something of it.
        buffers: name -> buffer of the base.
    """

    aside: TaskAside
    base: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor | None]


@torch.inference_mode(False)
@torch.no_grad()
def merge_aside(model: nn.Module) -> MergedTask:
    """Fold the task of a tuned model into its weights, as `merge` does, with a way back.

    Nothing of the model requires a gradient meanwhile.

    Raises:
        ValueError: it has an Adapter, or a head in the place of the model's own, or is no longer as
            `apply` made it; it is as it was.
    """
    now = BaseModel.of(model)
    problem = merge_problem(now)
    if problem is not None:
        raise ValueError(f"cannot merge {problem}")
    for name in tuning_of(model).replaced_head.modules:
        raise ValueError(
            f"cannot merge for a while: {name} is the task's own and stands where the model has "
            "one of other classes; merge it for good"
        )
    write_deltas(delta for delta in now.deltas.values() if not delta.is_fresh)
    names = {*now.deltas, *now.structured, *dense_names(model, now)}
    merged = {name: now.parameters[name].detach().clone() for name in names}
    for name, layer in now.structured.items():
        assert isinstance(layer, LoraLayer)
        fold(layer, merged[name])
    aside = take_aside(model)
    now = BaseModel.of(model)
    base = {name: now.parameters[name].detach().clone() for name in names}
    buffers = copied(now.buffers)
    for name, values in merged.items():
        now.parameters[name].copy_(values)
    set_buffers(now, aside.buffers)
    model.requires_grad_(False)
    return MergedTask(aside, base, buffers)


@torch.inference_mode(False)
@torch.no_grad()
def unmerge(model: nn.Module, merged: MergedTask) -> None:
    """Tune a model again, to the bit, by the task that `merge_aside` has folded into it."""
    now = BaseModel.of(model)
    for name, values in merged.base.items():
        now.parameters[name].copy_(values)
    set_buffers(now, merged.buffers)
    put_task_back(model, merged.aside)
