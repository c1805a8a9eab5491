"""A task taken off a model for a while: the base bit for bit, then the very task again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layers import LoraLayer, SetAside, all_or_nothing, put_back, set_aside, write_deltas
from ..model.buffers import copied
from ..model.class_labels import restore_class_labels
from ..model.kept import forget_kept
from ..model.replaced_head import name_classes, put_heads
from ..tuning import Tuning, unwatch_state_dicts, watch_state_dicts
from .base_model import BaseModel
from .exchange import Exchange
from .forward_state import set_buffers
from .intact import dense_names, drop_problem, merge_problem, tuning_of
from .transfer import fold, forget, restore_whole


@dataclass(frozen=True, eq=False)
class WholeValues:
    """What the base and its tasks have of the same parameters and buffers, each its own.

    Attributes:
        dense: name -> values of a parameter that is trained whole.
        gradients: name -> gradient of such a parameter, which is the base's as well: it must reach
            neither the base nor what another task makes of the parameter.
        buffers: name -> buffer.
        requires_grad: name -> whether a parameter of the base requires a gradient.
    """

    dense: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor | None]
    requires_grad: Mapping[str, bool]


@dataclass(frozen=True, eq=False)
class TaskAside(WholeValues):
    """What a model was tuned by; its trained parameters are the same when it is put back.

    Attributes:
        tuning: as `apply` or `load_delta` left it.
        modules: name of a tuned module -> what made it one.
        heads: name -> the task's own module, where it stood in the place of the model's.
    """

    tuning: Tuning
    modules: Mapping[str, SetAside]
    heads: Mapping[str, nn.Module]


@torch.inference_mode(False)  # what is made in it could never be trained
@torch.no_grad()
def take_aside(model: nn.Module, undo: ExitStack | None = None) -> TaskAside:
    """Make a tuned model plain, as `unload` does, and return what it takes to undo that.

    Unlike a task file this keeps the parameters themselves, so that an optimizer stays valid. On
    any error, as where memory runs out, the model is as it was.

    Args:
        model: tuned.
        undo: of a larger exchange: takes the way back.

    Raises:
        ValueError: the model is not tuned, or no longer as `apply` made it.
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
    write_deltas(delta for delta in now.deltas.values() if not delta.is_fresh)
    dense = {name: now.parameters[name].detach().clone() for name in names}
    gradients = {name: now.parameters[name].grad for name in names}
    with all_or_nothing(undo) as steps:
        modules = {name: set_aside(module, steps) for name, module in now.tuned.items()}
        aside = TaskAside(dense, gradients, buffers, flags, tuning, modules, heads)
        steps.callback(_set, now, aside)
        for name in names:
            now.parameters[name].grad = None
        set_buffers(now, tuning.base_buffers)
        steps.callback(_tell, model, now, aside)
        forget(model, now)
        steps.callback(put_heads, model, heads)
        restore_whole(model, now, tuning)
    return aside


@torch.inference_mode(False)
@torch.no_grad()
def put_task_back(model: nn.Module, aside: TaskAside, undo: ExitStack | None = None) -> None:
    """Tune a plain model as it was tuned before it was taken aside, to the bit.

    On any error, as where memory runs out, the model is plain as it was.

    Args:
        model: the same one; it may have been moved or cast since.
        aside: used up by this, unless there is an error.
        undo: of a larger exchange: takes the way back.
    """
    others = {name: model.get_submodule(name) for name in aside.heads}
    with all_or_nothing(undo) as steps:
        steps.callback(put_heads, model, others)
        put_heads(model, aside.heads)
        plain = BaseModel.of(model)
        steps.callback(_set, plain, _plain_values(plain, aside))
        for name, module in aside.modules.items():
            put_back(model.get_submodule(name), module, steps)
        now = BaseModel.of(model)
        _set(now, aside)
        _tell(model, now, aside)
        steps.callback(_untell, model)


def _plain_values(plain: BaseModel, aside: TaskAside) -> WholeValues:
    """Copies of what a plain model has in the place of what a task has."""
    parameters = plain.parameters
    return WholeValues(
        {name: parameters[name].detach().clone() for name in aside.dense},
        {name: parameters[name].grad for name in aside.dense},
        copied({name: plain.buffers[name] for name in aside.buffers}),
        {name: parameters[name].requires_grad for name in aside.requires_grad},
    )


@torch.no_grad()
def _set(now: BaseModel, held: WholeValues) -> None:
    """Give parameters and buffers the values, gradients and flags that were held."""
    for name, values in held.dense.items():
        parameter, gradient = now.parameters[name], held.gradients[name]
        parameter.copy_(values)
        parameter.grad = None if gradient is None else gradient.to(parameter)
    set_buffers(now, held.buffers)
    for name, flag in held.requires_grad.items():
        now.parameters[name].requires_grad_(flag)


def _tell(model: nn.Module, now: BaseModel, aside: TaskAside) -> None:
    """Let a model count as tuned."""
    tuning = aside.tuning
    head = {name: now.parameters[name] for name in tuning.plan.head}
    said = name_classes(model, tuning.replaced_head, head, tuning.classes)
    model.spt_tuning = replace(tuning, replaced_head=said)  # type: ignore[assignment]
    watch_state_dicts(model)
    forget_kept(model.modules())


def _untell(model: nn.Module) -> None:
    """Let a model that was tuned no longer count as such."""
    restore_class_labels(model, tuning_of(model).replaced_head.said)
    unwatch_state_dicts(model)
    del model.spt_tuning
    forget_kept(model.modules())


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

    Nothing of the model requires a gradient meanwhile. On any error the model is as it was.

    Raises:
        ValueError: it has an Adapter, or a head in the place of the model's own, or is no longer as
            `apply` made it.
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
    names = now.parameters.keys() & {*now.deltas, *now.structured, *dense_names(model, now)}
    merged = {name: now.parameters[name].detach().clone() for name in names}
    for name, layer in now.structured.items():
        assert isinstance(layer, LoraLayer)
        fold(layer, merged[name])
    exchange = Exchange((now.parameters[name], values) for name, values in merged.items())
    with all_or_nothing() as steps:
        aside = take_aside(model, steps)
        now = BaseModel.of(model)
        buffers = copied(now.buffers)
        exchange()
        steps.callback(exchange)
        set_buffers(now, aside.buffers)
        model.requires_grad_(False)
    return MergedTask(aside, merged, buffers)


@torch.inference_mode(False)
@torch.no_grad()
def unmerge(model: nn.Module, merged: MergedTask, undo: ExitStack | None = None) -> None:
    """Tune a model again, to the bit, by the task that `merge_aside` has folded into it.

    On any error it is merged as it was.

    Args:
        model: merged; it may have been moved or cast since.
        merged: used up by this, unless there is an error.
        undo: of a larger exchange: takes the way back.
    """
    now = BaseModel.of(model)
    pairs = [(now.parameters[name], values) for name, values in merged.base.items()]
    exchange = Exchange((parameter, values.to(parameter)) for parameter, values in pairs)
    buffers = copied(now.buffers)
    with all_or_nothing(undo) as steps:
        exchange()
        steps.callback(exchange)
        steps.callback(set_buffers, now, buffers)
        set_buffers(now, merged.buffers)
        put_task_back(model, merged.aside, steps)
