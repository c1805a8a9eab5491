"""One task on its way between a model and a `TaskFile`: captured, checked, put on, dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import LoraLinear, restore_deltas, untune, write_deltas
from ..model.replaced_head import fit_head, head_problem, restore_head
from ..plan import Plan
from ..tuning import Tuning, apply, train_whole
from .base_model import BaseModel, BaseTensor
from .file.fingerprint import Fingerprint
from .file.format import TaskFile, structured_shapes


@dataclass(frozen=True, eq=False)
class HeldTask:
    """The task that a tuned model holds, as copies; the attributes are those of a `TaskFile`."""

    plan: Plan
    values: Mapping[str, Tensor]
    structured: Mapping[str, Mapping[str, Tensor]]
    dense: Mapping[str, Tensor]


Task = TaskFile | HeldTask  # what can be put on a model


def hold(
    model: nn.Module, now: BaseModel, kept: Callable[[str, Tensor], Tensor] | None = None
) -> HeldTask:
    """Copy the task that a tuned model holds.

    Args:
        model: tuned.
        now: what is where in it.
        kept: from name and tensor to what is to be held of it; None for a copy where it is.
    """
    plan = _tuning_of(model).plan
    keep = kept or (lambda _, tensor: tensor.detach().clone())
    tensors = now.trained_tensors
    return HeldTask(
        plan,
        {name: keep(name, now.deltas[name].delta) for name in plan.unstructured},
        {
            name: {
                local: keep(f"{name} ({local})", getattr(now.structured[name], local))
                for local in structured_shapes(spec)
            }
            for name, spec in plan.structured.items()
        },
        {name: keep(name, tensors[name]) for name in sorted(_dense_names(model, now))},
    )


def capture(
    model: nn.Module, dtype: torch.dtype, metadata: Mapping[str, Any] = MappingProxyType({})
) -> TaskFile:
    """The task that a tuned model holds, its values rounded to `dtype` unless that is fp32.

    Raises:
        ValueError: a value is NaN, infinite, or too large for `dtype`, or the metadata does not fit
            the task.
    """
    now = BaseModel.of(model)
    held = hold(model, now, lambda name, tensor: _kept(name, tensor, dtype))
    plan = held.plan
    touched = {*plan.unstructured, *plan.structured}
    # a head alone touches nothing: then all that it reads from is what it was trained on
    touched = touched or now.parameters.keys() - held.dense.keys()
    return TaskFile(
        model_name=plan.model_name or type(model).__name__,
        plan=plan,
        base=Fingerprint.of_all(_base_tensors(model, now, touched)),
        values=held.values,
        structured=held.structured,
        dense=held.dense,
        metadata=metadata,
    )


def check_fits(model: nn.Module, now: BaseModel, task: TaskFile) -> str | None:
    """What is wrong with `model`, plain or tuned, as the base of this task; None if nothing is."""
    shapes = {name: entry.shape for name, entry in task.base.items()}
    shapes |= {name: tuple(info.shape) for name, info in task.plan.info.items()}
    base = _base_tensors(model, now, shapes.keys())
    for name, shape in shapes.items():
        if name not in base:
            return f"the model has no parameter {name} (the task is for {task.model_name})"
        if tuple(base[name][0].shape) != shape:
            got = list(base[name][0].shape)
            return f"{name}: expected shape {list(shape)}, got {got}"
    found = Fingerprint.of_all({name: base[name] for name in task.base})
    for name, fingerprint in task.base.items():
        difference = fingerprint.difference(found[name])
        if difference is not None:
            return f"{name}: {difference}"
    whole = now.tensors
    for name, tensor in task.dense.items():
        if name in task.plan.head:
            continue
        if name not in whole:
            return f"the model has no tensor {name} (the task is for {task.model_name})"
        if whole[name].shape != tensor.shape:
            got = list(whole[name].shape)
            return f"{name}: expected shape {list(tensor.shape)}, got {got}"
    head = {name: task.dense[name] for name in task.plan.head}
    return head_problem(model, head, elsewhere=task.plan.info.keys() - head.keys())


def has_same_structure(model: nn.Module, now: BaseModel, task: TaskFile) -> bool:
    """Whether the model is tuned by a plan that differs from the task's in values alone."""
    if getattr(model, "spt_tuning", None) is None:
        return False
    ours, other = _tuning_of(model).plan, task.plan
    whole, dense = now.tensors, _dense_names(model, now)
    return (
        ours.head == other.head
        and _read_weights(ours) == _read_weights(other)
        and ours.structured == other.structured
        and ours.unstructured.keys() == other.unstructured.keys()
        and all(torch.equal(p, other.unstructured[n]) for n, p in ours.unstructured.items())
        and dense == task.dense.keys()
        and all(whole[name].shape == task.dense[name].shape for name in dense)
    )


@torch.no_grad()
def fill(model: nn.Module, now: BaseModel, task: Task) -> None:
    """Copy the task's values into a model tuned by its plan, and write the weights."""
    whole = now.trained_tensors
    for name, values in task.values.items():
        now.deltas[name].delta.copy_(values)
    for name, parts in task.structured.items():
        for local, part in parts.items():
            getattr(now.structured[name], local).copy_(part)
    for name, tensor in task.dense.items():
        whole[name].copy_(tensor)
    write_deltas(now.deltas.values())
    _change_tuning(model, plan=task.plan)


def put(model: nn.Module, task: Task) -> None:
    """Tune a plain model, which `check_fits` found fitting; on an error it is plain again."""
    head = {name: task.dense[name] for name in task.plan.head}
    replaced = fit_head(model, head, elsewhere=task.plan.info.keys() - head.keys())
    try:
        apply(model, task.plan)
        now = BaseModel.of(model)
        whole = now.tensors
        extra = [name for name in task.dense if name not in task.plan.head]
        known = {name: whole[name].detach().clone() for name in extra}
        _change_tuning(model, base_head={**_tuning_of(model).base_head, **known})
        for name in now.parameters.keys() & extra:
            train_whole(model, name)
        fill(model, BaseModel.of(model), task)
    except BaseException:
        if hasattr(model, "spt_tuning"):
            drop(model, BaseModel.of(model))
        restore_head(model, replaced)
        raise
    _change_tuning(model, replaced_head=replaced)


def drop_problem(model: nn.Module, now: BaseModel) -> str | None:
    """Why the base of a tuned model cannot be restored; None if it can."""
    known = _tuning_of(model).base_head
    # running statistics of a model trained here stay as they are: `apply` keeps no copy of them
    lost = sorted(_dense_names(model, now) - known.keys() - now.buffers.keys())
    if not lost:
        return None
    return (
        f"the base value of {lost[0]} is not known: it was made trainable after apply(); "
        "save the task and load it onto a fresh base model"
    )


@torch.no_grad()
def drop(model: nn.Module, now: BaseModel, *, merge: bool = False) -> None:
    """Make a tuned model plain again: with its base values, or with the task merged into them."""
    tuning = _tuning_of(model)
    if merge:
        write_deltas(now.deltas.values())
        for layer in now.structured.values():
            assert isinstance(layer, LoraLinear)  # `merge` refuses anything else
            _fold(layer)
    else:
        restore_deltas(now.deltas.values())
    for module in now.tuned.values():
        untune(module)
    del model.spt_tuning
    for name, flag in tuning.requires_grad.items():
        now.parameters[name].requires_grad_(flag)
    if not merge:
        whole = now.tensors
        for name, tensor in tuning.base_head.items():
            whole[name].copy_(tensor)
        restore_head(model, tuning.replaced_head)


def _base_tensors(
    model: nn.Module, now: BaseModel, names: Collection[str]
) -> dict[str, BaseTensor]:
    """Parameters as they are in the base: without deltas, and the head as it was."""
    found = now.base_tensors(names)
    tuning = getattr(model, "spt_tuning", None)
    if tuning is None:
        return found
    known = dict(tuning.base_head)
    for module_name, module in tuning.replaced_head.modules.items():
        known |= {f"{module_name}.{n}": p for n, p in module.named_parameters(recurse=False)}
    return found | {name: (known[name], None, None) for name in known.keys() & names}


def _fold(layer: LoraLinear) -> None:
    """`weight[rows] += scale · B A`, in fp32 and rounded once; other rows keep their bits."""
    weight, update = layer.weight, LoraLinear.update(layer)
    for start, stop in layer.__dict__["_spt_spec"].rows:
        rows = weight[start:stop]
        rows.copy_(rows.float() + update[start:stop])


def _dense_names(model: nn.Module, now: BaseModel) -> set[str]:
    """Names of what is trained whole: the head, whatever else is trainable, running statistics."""
    tuning = _tuning_of(model)
    trainable = {name for name, p in now.parameters.items() if p.requires_grad}
    trainable |= {name for name in now.parameters.keys() & now.deltas if now.deltas[name].whole}
    return {*tuning.plan.head, *tuning.base_head, *trainable, *now.buffers}


def _tuning_of(model: nn.Module) -> Tuning:
    tuning: Any = model.spt_tuning
    assert isinstance(tuning, Tuning)
    return tuning


def _change_tuning(model: nn.Module, **changes: Any) -> None:
    model.spt_tuning = replace(_tuning_of(model), **changes)  # type: ignore[assignment]


def _read_weights(plan: Plan) -> set[str]:
    """Weights that the model reads itself: their layers are tuned in place, others are replaced."""
    return {name for name, info in plan.info.items() if info.kind == "functional"}


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
