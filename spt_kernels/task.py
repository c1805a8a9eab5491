"""One task on its way between a model and a `TaskFile`: captured, checked, put on, dropped."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .base_model import base_parameters, base_tensors
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
    tuning: Tuning = model.spt_tuning  # type: ignore[assignment]
    plan = tuning.plan
    deltas, layers = sparse_deltas(model), structured_layers(model)
    parameters = base_parameters(model)
    dense = _dense_names(model)
    touched = {*plan.unstructured, *plan.structured}
    # a head alone touches nothing: then all that it reads from is what it was trained on
    touched = touched or parameters.keys() - dense
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
        dense={name: _kept(name, parameters[name], dtype) for name in sorted(dense)},
    )


def check_fits(model: nn.Module, task: TaskFile) -> str | None:
    """What is wrong with `model`, plain or tuned, as the base of this task; None if nothing is."""
    parameters = base_parameters(model)
    for name in task.base:
        if name not in parameters:
            return f"the model has no parameter {name} (the task is for {task.model_name})"
    for name, entry in task.base.items():
        if tuple(parameters[name].shape) != entry.shape:
            got = list(parameters[name].shape)
            return f"{name}: expected shape {list(entry.shape)}, got {got}"
    for name, base in base_tensors(model, task.base.keys()):
        difference = task.base[name].difference(base)
        if difference is not None:
            return f"{name}: {difference}"
    for name, tensor in task.dense.items():
        if name in task.plan.head:
            continue
        if name not in parameters:
            return f"the model has no parameter {name} (the task is for {task.model_name})"
        if parameters[name].shape != tensor.shape:
            got = list(parameters[name].shape)
            return f"{name}: expected shape {list(tensor.shape)}, got {got}"
    return head_problem(model, {name: task.dense[name] for name in task.plan.head})


def has_same_structure(model: nn.Module, task: TaskFile) -> bool:
    """Whether the model is tuned by a plan that differs from the task's in values alone."""
    tuning: Tuning | None = getattr(model, "spt_tuning", None)
    if tuning is None:
        return False
    ours, other = tuning.plan, task.plan
    parameters, dense = base_parameters(model), _dense_names(model)
    return (
        ours.head == other.head
        and ours.structured == other.structured
        and ours.unstructured.keys() == other.unstructured.keys()
        and all(torch.equal(p, other.unstructured[n]) for n, p in ours.unstructured.items())
        and dense == task.dense.keys()
        and all(parameters[name].shape == task.dense[name].shape for name in dense)
    )


@torch.no_grad()
def fill(model: nn.Module, task: TaskFile) -> None:
    """Copy the task's values into a model tuned by its plan, and write the weights."""
    deltas, layers = sparse_deltas(model), structured_layers(model)
    parameters = base_parameters(model)
    for name, values in task.values.items():
        deltas[name].delta.copy_(values)
    for name, parts in task.structured.items():
        for local, part in parts.items():
            getattr(layers[name], local).copy_(part)
    for name, tensor in task.dense.items():
        parameters[name].copy_(tensor)
    write_deltas(deltas.values())
    model.spt_tuning = replace(model.spt_tuning, plan=task.plan)  # type: ignore[arg-type]


def put(model: nn.Module, task: TaskFile) -> None:
    """Tune a plain model, which `check_fits` found fitting; on an error it is plain again."""
    replaced = fit_head(model, {name: task.dense[name] for name in task.plan.head})
    try:
        apply(model, task.plan)
        parameters = base_parameters(model)
        extra = [name for name in task.dense if name not in task.plan.head]
        known = {name: parameters[name].detach().clone() for name in extra}
        base_head = {**model.spt_tuning.base_head, **known}  # type: ignore[union-attr]
        model.spt_tuning = replace(model.spt_tuning, base_head=base_head)  # type: ignore[arg-type]
        for name in extra:
            parameters[name].requires_grad_(True)
        fill(model, task)
    except BaseException:
        if hasattr(model, "spt_tuning"):
            drop(model)
        restore_head(model, replaced)
        raise
    model.spt_tuning = replace(model.spt_tuning, replaced_head=replaced)  # type: ignore[arg-type]


def drop_problem(model: nn.Module) -> str | None:
    """Why the base of a tuned model cannot be restored; None if it can."""
    known = model.spt_tuning.base_head  # type: ignore[union-attr]
    lost = sorted(_dense_names(model) - known.keys())
    if not lost:
        return None
    return (
        f"the base value of {lost[0]} is not known: it was made trainable after apply(); "
        "save the task and load it onto a fresh base model"
    )


@torch.no_grad()
def drop(model: nn.Module, *, merge: bool = False) -> None:
    """Make a tuned model plain again: with its base values, or with the task merged into them."""
    tuning: Tuning = model.spt_tuning  # type: ignore[assignment]
    deltas = sparse_deltas(model).values()
    if merge:
        write_deltas(deltas)
        for layer in structured_layers(model).values():
            _fold(layer)
    else:
        restore_deltas(deltas)
    for name, module in tuned_modules(model).items():
        if is_attached(module):
            detach_parameters(module)
        else:
            replace_module(model, name, module.plain)
    del model.spt_tuning
    parameters = dict(model.named_parameters())
    for name, flag in tuning.requires_grad.items():
        parameters[name].requires_grad_(flag)
    if not merge:
        for name, tensor in tuning.base_head.items():
            parameters[name].copy_(tensor)
        restore_head(model, tuning.replaced_head)


def _fold(layer: LoraLinear) -> None:
    """`weight[rows] += scale · B A`, in fp32 and rounded once; other rows keep their bits."""
    weight, update = layer.plain.weight, layer.update()
    for start, stop in layer.spec.rows:
        rows = weight[start:stop]
        rows.copy_(rows.float() + update[start:stop])


def _dense_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained whole: the head, and what else is trainable."""
    tuning: Tuning = model.spt_tuning  # type: ignore[assignment]
    trainable = {name for name, p in base_parameters(model).items() if p.requires_grad}
    return {*tuning.plan.head, *tuning.base_head, *trainable}


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
