"""Whether a tuned model still is what `apply` made of it, asked before anything is done to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers import AdapterLayer, SparseDelta
from ..layers.deltas.held_values import holds
from ..model.quantized import logical_shape, quantization
from ..tuning import Tuning
from .base_model import BaseModel
from .file.format import structured_shapes

_REPLACED = "was removed or replaced after apply()"
_GONE = "it was removed, or its module replaced, after apply()"


def tuning_of(model: nn.Module) -> Tuning:
    """What `apply` left on a model that is tuned."""
    tuning: Any = model.spt_tuning
    assert isinstance(tuning, Tuning)
    return tuning


def dense_names(model: nn.Module, now: BaseModel) -> set[str]:
    """Names of parameters that are trained whole: the head, and whatever else is trainable."""
    tuning = tuning_of(model)
    trainable = {name for name, p in now.parameters.items() if p.requires_grad}
    trainable |= {name for name in now.parameters.keys() & now.deltas if now.deltas[name].whole}
    return {*tuning.plan.head, *tuning.base_head, *trainable}


def task_problem(model: nn.Module, now: BaseModel) -> str | None:
    """What has become of a tuned model so that its task is no longer whole; None if it is.

    A head of another number of rows is none: it is saved and merged as it is.
    """
    tuning = tuning_of(model)
    found = _missing(model, now) or _tuned_problem(now, tuning)
    if found is not None or tuning.frozen is None:
        return found
    dense = dense_names(model, now)
    for name, before in tuning.frozen.tensors.items():
        shape = logical_shape(now.parameters[name])
        if name not in dense and shape != before.shape:
            return (
                f"{name} is {list(shape)} and was {list(before.shape)} when the plan was applied: "
                "give the model its shapes first, then apply the plan"
            )
    return None


def drop_problem(model: nn.Module, now: BaseModel) -> str | None:
    """Why the base of a tuned model cannot be restored; None if it can."""
    found = task_problem(model, now)
    if found is not None:
        return found
    known = tuning_of(model).base_head
    for name, before in known.items():
        after = now.parameters[name]
        if after.shape != before.shape:
            return (
                f"{name} is {list(after.shape)} and was {list(before.shape)} when the plan was "
                "applied: its module was replaced after apply(); put the one that was there back, "
                "and replace it once the model is plain again"
            )
    lost = sorted(dense_names(model, now) - known.keys())
    if not lost:
        return None
    return (
        f"the base value of {lost[0]} is not known: it was made trainable after apply(); "
        "save the task and load it onto a fresh base model"
    )


def merge_problem(now: BaseModel) -> str | None:
    """What of a tuned model has no weights to fold into, and why; None if all has."""
    for name in (*now.deltas, *now.structured):
        # of what is tied, a delta is known by each name, and the parameter by the first
        quantized = quantization(now.parameters[name]) if name in now.parameters else ""
        if quantized and now.is_planned(name):
            return (
                f"{name}: it is quantized to {quantized}, and what was trained beside it would be "
                "lost in rounding; spt.dequantize(model) makes floats of such weights and keeps "
                "the task, which merge can then fold in; or go on with the tuned model as it is"
            )
    for name, layer in now.structured.items():
        if isinstance(layer, AdapterLayer):
            return (
                f"{name}: an Adapter is not linear and has no weights to fold into; keep the tuned "
                "model, or tune with LoRA"
            )
    return None


def _missing(model: nn.Module, now: BaseModel) -> str | None:
    """A parameter, buffer or module that is no longer there."""
    tuning = tuning_of(model)
    for name in tuning.requires_grad:
        if name not in now.parameters:
            if name in tuning.plan.head:
                return (
                    f"{name} of the head is gone: {_GONE}; put the one that was there back, and "
                    "give a model its head before the plan is applied"
                )
            return f"{name} is gone: {_GONE}; put it back"
    for name in tuning.base_buffers:
        if name not in now.owners:
            return f"the buffer {name} is gone: {_GONE}; put it back"
    return None


def _tuned_problem(now: BaseModel, tuning: Tuning) -> str | None:
    """A tuned layer that is not as planned, or not planned."""
    plan = tuning.plan
    for names, found in ((plan.unstructured, now.deltas), (plan.structured, now.structured)):
        for name in names:
            if name not in found:
                return f"{name} is not tuned now: its layer {_REPLACED}; put the tuned one back"
            before, after = list(plan.info[name].shape), list(logical_shape(now.parameters[name]))
            if before != after:
                return f"{name} is {after}, planned for {before}: it {_REPLACED}; put it back"
    for name in [*now.deltas, *now.structured]:
        if now.is_planned(name) and name not in {*plan.unstructured, *plan.structured}:
            return f"{name} is tuned, but not by the plan that was applied: take that layer out"
    for name, positions in plan.unstructured.items():
        delta = now.deltas[name]
        if delta.target.requires_grad and not _holds(delta):
            return (
                f"{name} is trained whole besides its delta, and no longer holds that: it was "
                "registered anew after apply() with other values; put back the one that was there"
            )
        if delta.delta.shape != delta.index.shape or not _same(delta.index, positions):
            return (
                f"{name} is trained at other positions than planned: a state dict of another plan "
                "was loaded, or its delta was replaced; apply that plan to the base model instead"
            )
    for name, spec in plan.structured.items():
        layer: Any = now.structured[name]
        for local, shape in structured_shapes(spec).items():
            part = layer._parameters.get(local)
            if part is None or layer.spec != spec or tuple(part.shape) != shape:
                return f"{local} on {name} is not as planned: it {_REPLACED}; put it back"
    return None


def _holds(delta: SparseDelta) -> bool:
    """Whether the parameter is base + delta where it is tuned, or will be by the next forward."""
    is_told = delta.delta.shape == delta.index.shape and delta.is_fresh and not delta.beside
    return holds(delta) if is_told else True


def _same(index: torch.Tensor, positions: torch.Tensor) -> bool:
    return index.shape == positions.shape and torch.equal(
        index.cpu().long(), positions.cpu().long()
    )
