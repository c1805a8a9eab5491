"""One task on its way between a model and a `TaskFile`: captured, checked, put on, dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base_model import base_buffers, base_parameters, base_tensors
from .layers import (
    LoraLinear,
    detach_parameters,
    is_attached,
    restore_deltas,
    sparse_deltas,
    structured_layers,
    tuned_modules,
    write_deltas,
)
from .replaced_head import fit_head, head_problem, restore_head
from .task_file.fingerprint import Fingerprint
from .task_file.format import TaskFile, structured_shapes
from .tuning import Tuning, apply, replace_module


def capture(model: nn.Module, dtype: torch.dtype) -> TaskFile:
    """The task that a tuned model holds, its values rounded to `dtype` unless that is fp32.

    Raises:
        ValueError: a value is NaN, infinite, or too large for `dtype`.
    """
    tuning = _tuning_of(model)
    plan = tuning.plan
    if not plan.head:  # then `apply` found the head by itself, and a loader must know it
        plan = replace(plan, head=tuple(tuning.base_head))
    deltas, layers = sparse_deltas(model), structured_layers(model)
    whole = base_parameters(model) | base_buffers(model)
    dense = _dense_names(model)
    touched = {*plan.unstructured, *plan.structured}
    # a head alone touches nothing: then all that it reads from is what it was trained on
    touched = touched or base_parameters(model).keys() - dense
    return TaskFile(
        model_name=plan.model_name or type(model).__name__,
        plan=plan,
        base={name: Fingerprint.of(base) for name, base in base_tensors(model, touched)},
        values={name: _kept(name, deltas[name].delta, dtype) for name in plan.unstructured},
        structured={
            name: {
                local: _kept(f"{name} ({local})", getattr(layers[name], local), dtype)
                for local in structured_shapes(spec)
            }
            for name, spec in plan.structured.items()
        },
        dense={name: _kept(name, whole[name], dtype) for name in sorted(dense)},
    )


def check_fits(model: nn.Module, task: TaskFile) -> str | None:
    """What is wrong with `model`, plain or tuned, as the base of this task; None if nothing is."""
    parameters = base_parameters(model)
    shapes = {name: entry.shape for name, entry in task.base.items()}
    shapes |= {name: tuple(info.shape) for name, info in task.plan.info.items()}
    for name, shape in shapes.items():
        if name not in parameters:
            return f"the model has no parameter {name} (the task is for {task.model_name})"
        if tuple(parameters[name].shape) != shape:
            got = list(parameters[name].shape)
            return f"{name}: expected shape {list(shape)}, got {got}"
    for name, base in base_tensors(model, task.base.keys()):
        difference = task.base[name].difference(base)
        if difference is not None:
            return f"{name}: {difference}"
    whole = parameters | base_buffers(model)
    for name, tensor in task.dense.items():
        if name in task.plan.head:
            continue
        if name not in whole:
            return f"the model has no tensor {name} (the task is for {task.model_name})"
        if whole[name].shape != tensor.shape:
            got = list(whole[name].shape)
            return f"{name}: expected shape {list(tensor.shape)}, got {got}"
    return head_problem(model, {name: task.dense[name] for name in task.plan.head})


def has_same_structure(model: nn.Module, task: TaskFile) -> bool:
    """Whether the model is tuned by a plan that differs from the task's in values alone."""
    if getattr(model, "spt_tuning", None) is None:
        return False
    ours, other = _tuning_of(model).plan, task.plan
    whole, dense = base_parameters(model) | base_buffers(model), _dense_names(model)
    return (
        ours.head == other.head
        and ours.structured == other.structured
        and ours.unstructured.keys() == other.unstructured.keys()
        and all(torch.equal(p, other.unstructured[n]) for n, p in ours.unstructured.items())
        and dense == task.dense.keys()
        and all(whole[name].shape == task.dense[name].shape for name in dense)
    )


@torch.no_grad()
def fill(model: nn.Module, task: TaskFile) -> None:
    """Copy the task's values into a model tuned by its plan, and write the weights."""
    deltas, layers = sparse_deltas(model), structured_layers(model)
    whole = base_parameters(model) | base_buffers(model)
    for name, values in task.values.items():
        deltas[name].delta.copy_(values)
    for name, parts in task.structured.items():
        for local, part in parts.items():
            getattr(layers[name], local).copy_(part)
    for name, tensor in task.dense.items():
        whole[name].copy_(tensor)
    write_deltas(deltas.values())
    _change_tuning(model, plan=task.plan)


def put(model: nn.Module, task: TaskFile) -> None:
    """Tune a plain model, which `check_fits` found fitting; on an error it is plain again."""
    replaced = fit_head(model, {name: task.dense[name] for name in task.plan.head})
    try:
        apply(model, task.plan)
        parameters = base_parameters(model)
        whole = parameters | base_buffers(model)
        extra = [name for name in task.dense if name not in task.plan.head]
        known = {name: whole[name].detach().clone() for name in extra}
        _change_tuning(model, base_head={**_tuning_of(model).base_head, **known})
        for name in parameters.keys() & extra:
            parameters[name].requires_grad_(True)
        fill(model, task)
    except BaseException:
        if hasattr(model, "spt_tuning"):
            drop(model)
        restore_head(model, replaced)
        raise
    _change_tuning(model, replaced_head=replaced)


def drop_problem(model: nn.Module) -> str | None:
    """Why the base of a tuned model cannot be restored; None if it can."""
    known = _tuning_of(model).base_head
    # running statistics of a model trained here stay as they are: `apply` keeps no copy of them
    lost = sorted(_dense_names(model) - known.keys() - base_buffers(model).keys())
    if not lost:
        return None
    return (
        f"the base value of {lost[0]} is not known: it was made trainable after apply(); "
        "save the task and load it onto a fresh base model"
    )


@torch.no_grad()
def drop(model: nn.Module, *, merge: bool = False) -> None:
    """Make a tuned model plain again: with its base values, or with the task merged into them."""
    tuning = _tuning_of(model)
    deltas = sparse_deltas(model).values()
    if merge:
        write_deltas(deltas)
        for layer in structured_layers(model).values():
            assert isinstance(layer, LoraLinear)  # `merge` refuses anything else
            _fold(layer)
    else:
        restore_deltas(deltas)
    for name, module in tuned_modules(model).items():
        if is_attached(module):
            detach_parameters(module)
        else:
            replace_module(model, name, module.plain)  # type: ignore[arg-type]
    del model.spt_tuning
    parameters = base_parameters(model)
    for name, flag in tuning.requires_grad.items():
        parameters[name].requires_grad_(flag)
    if not merge:
        whole = parameters | base_buffers(model)
        for name, tensor in tuning.base_head.items():
            whole[name].copy_(tensor)
        restore_head(model, tuning.replaced_head)


def _fold(layer: LoraLinear) -> None:
    """`weight[rows] += scale · B A`, in fp32 and rounded once; other rows keep their bits."""
    weight, update = layer.weight, layer.update()
    for start, stop in layer.spec.rows:
        rows = weight[start:stop]
        rows.copy_(rows.float() + update[start:stop])


def _dense_names(model: nn.Module) -> set[str]:
    """Names of what is trained whole: the head, whatever else is trainable, running statistics."""
    tuning = _tuning_of(model)
    trainable = {name for name, p in base_parameters(model).items() if p.requires_grad}
    return {*tuning.plan.head, *tuning.base_head, *trainable, *base_buffers(model)}


def _tuning_of(model: nn.Module) -> Tuning:
    tuning: Any = model.spt_tuning
    assert isinstance(tuning, Tuning)
    return tuning


def _change_tuning(model: nn.Module, **changes: Any) -> None:
    model.spt_tuning = replace(_tuning_of(model), **changes)  # type: ignore[assignment]


def _kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    values = tensor.detach().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinite values: the training diverged")
    if dtype == torch.float32:
        return values.clone()
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds values too large for {kind}: save in bfloat16 or float32")
    return rounded
