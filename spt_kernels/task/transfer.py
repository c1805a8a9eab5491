"""One task on its way between a model and a `TaskFile`: captured, put on, dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharded import put_whole, whole
from ..layers import LoraLayer, restore_deltas, untune, write_deltas
from ..model.buffers import copied
from ..model.kept import forget_kept
from ..model.replaced_head import fit_head, name_classes, restore_head
from ..plan import Plan
from ..tuning import Tuning, apply_to_known, train_whole, unwatch_state_dicts
from .base_model import BaseModel
from .file.fingerprint import Fingerprint
from .file.format import TaskFile, structured_shapes
from .fit import base_values
from .forward_state import base_buffers, buffers_of, changed_buffers, set_buffers
from .frozen import FrozenState
from .intact import dense_names, tuning_of


@dataclass(frozen=True, eq=False)
class HeldTask:
    """The task that a tuned model holds, as copies; the attributes are those of a `TaskFile`."""

    plan: Plan
    values: Mapping[str, Tensor]
    structured: Mapping[str, Mapping[str, Tensor]]
    dense: Mapping[str, Tensor]
    beside_head: frozenset[str]
    buffers: Mapping[str, Tensor | None] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


Task = TaskFile | HeldTask  # what can be put on a model


def hold(model: nn.Module, now: BaseModel) -> HeldTask:
    """Copy the task that a tuned model holds, with all buffers, where it is.

    Args:
        model: tuned.
        now: what is where in it.
    """
    held = _collect(model, now, lambda _, tensor: tensor.detach().clone())
    return replace(held, buffers=copied(now.buffers), classes=tuning_of(model).classes)


def capture(
    model: nn.Module,
    now: BaseModel,
    frozen: FrozenState,
    dtype: torch.dtype,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> TaskFile:
    """The task that a tuned model holds.

    Args:
        model: tuned.
        now: what is where in it.
        frozen: how its frozen parameters stand to the base.
        dtype: what trained values are rounded to, unless it is fp32. Buffers keep their own.
        metadata: see `TaskFile`.

    Raises:
        ValueError: a value is NaN, infinite, or too large for `dtype`, or the metadata does not fit
            the task.
    """
    held = _collect(model, now, lambda name, tensor: _kept(name, tensor, dtype))
    tuning, plan = tuning_of(model), held.plan
    changed = changed_buffers(now, tuning)
    buffers = {name: _kept(name, buffer, torch.float32) for name, buffer in changed.items()}
    touched = {*plan.unstructured, *plan.structured}
    # a head alone touches nothing: then all that it reads from is what it was trained on
    touched = touched or now.parameters.keys() - held.dense.keys()
    touched |= held.beside_head - plan.info.keys()
    # what forwards might have changed, and did not, is none of the task's but of its base
    steady = base_buffers(now, tuning).keys() - changed.keys()
    base, present = dict(frozen.base), dict(frozen.present)
    rest = base_values(model, now, (touched | steady) - base.keys())
    base |= Fingerprint.of_all(rest)
    for name in steady:
        buffer = now.buffers[name]
        if buffer is not None and buffer.dtype != rest[name][0].dtype:
            present[name] = Fingerprint.of(rest[name][0].to(buffer))
    touched |= steady
    recast = {n: present[n] for n in touched & present.keys() if present[n] != base[n]}
    return TaskFile(
        model_name=plan.model_name or type(model).__name__,
        plan=plan,
        base={name: base[name] for name in touched},
        values=held.values,
        structured=held.structured,
        dense=held.dense,
        buffers=buffers,
        metadata=metadata,
        recast=recast,
        tied={name: tuple(now.tied[name]) for name in held.dense.keys() & now.tied.keys()},
    )


@torch.no_grad()
def fill(model: nn.Module, now: BaseModel, task: Task) -> None:
    """Copy the task's values into a model tuned by its plan, and write the weights."""
    tuning, trained = tuning_of(model), now.trained_tensors
    for name, values in task.values.items():
        put_whole(now.deltas[name].delta, values)
    for name, parts in task.structured.items():
        for local, part in parts.items():
            put_whole(getattr(now.structured[name], local), part)
    for name in task.dense.keys() - now.buffers.keys():
        put_whole(trained[name], task.dense[name])
    buffers: Mapping[str, Tensor | None] = task.buffers
    if isinstance(task, TaskFile):
        buffers, classes = buffers_of(task, now), tuple(task.metadata.get("classes", ()))
    else:
        classes = task.classes
    set_buffers(now, {**tuning.base_buffers, **buffers})
    write_deltas(now.deltas.values())
    replaced = name_classes(model, tuning.replaced_head, _head(task), classes)
    _change_tuning(model, plan=task.plan, classes=classes, replaced_head=replaced)
    forget_kept(model.modules())


def put(model: nn.Module, task: Task, digests: Mapping[str, str] = MappingProxyType({})) -> None:
    """Tune a plain model, which `Fit` found fitting; on an error it is plain again.

    Args:
        model: plain.
        task: its own.
        digests: parameter name -> fingerprint of its values, where it is known.
    """
    head = _head(task)
    replaced = fit_head(model, head, task.beside_head)
    try:
        # of a head in another's place nothing is known
        apply_to_known(model, task.plan, {n: d for n, d in digests.items() if n not in head})
    except BaseException:
        restore_head(model, replaced)
        raise
    _change_tuning(model, replaced_head=replaced)
    try:
        train_besides(model, task.dense.keys() - set(task.plan.head))
        fill(model, BaseModel.of(model), task)
    except BaseException:
        drop(model, BaseModel.of(model))
        raise


def train_besides(model: nn.Module, names: Collection[str]) -> None:
    """Train more parameters of a tuned model whole; `drop` knows what they were.

    Args:
        model: tuned.
        names: of parameters that the plan does not touch; what is no parameter, or is trained
            whole already, is passed over.
    """
    parameters, base = BaseModel.of(model).parameters, tuning_of(model).base_head
    wanted = (parameters.keys() & names) - base.keys()
    known = {name: parameters[name].detach().clone() for name in wanted}
    _change_tuning(model, base_head={**base, **known})
    for name in known:
        train_whole(model, name)


@torch.no_grad()
def drop(model: nn.Module, now: BaseModel, *, merge: bool = False) -> None:
    """Make a tuned model plain again: with its base values, or with the task merged into them."""
    tuning = tuning_of(model)
    if merge:
        write_deltas(now.deltas.values())
        # the largest first: where there is the memory for it, there is for all others
        for layer in sorted(now.structured.values(), key=lambda own: -own.weight.numel()):
            assert isinstance(layer, LoraLayer)  # `merge` refuses anything else
            fold(layer, layer.weight)
    else:
        restore_deltas(now.deltas.values())
        set_buffers(now, tuning.base_buffers)
    for module in now.tuned.values():
        untune(module)
    forget(model, now)
    if not merge:
        restore_whole(model, now, tuning)


def forget(model: nn.Module, now: BaseModel) -> None:
    """Let a model whose modules are plain again no longer count as tuned."""
    unwatch_state_dicts(model)
    flags = tuning_of(model).requires_grad
    del model.spt_tuning
    for name, flag in flags.items():
        now.parameters[name].requires_grad_(flag)
    forget_kept(model.modules())


def restore_whole(model: nn.Module, now: BaseModel, tuning: Tuning) -> None:
    """Give what was trained whole its base values, and a replaced head's place the model's own."""
    for name, tensor in tuning.base_head.items():
        now.parameters[name].copy_(tensor)
    restore_head(model, tuning.replaced_head)


def _collect(model: nn.Module, now: BaseModel, kept: Callable[[str, Tensor], Tensor]) -> HeldTask:
    """What a tuned model trains; `kept` makes of a name and a tensor what is held of it."""
    plan, trained = tuning_of(model).plan, now.trained_tensors
    whole, modules = dense_names(model, now), {name.rpartition(".")[0] for name in plan.head}
    layers = {name for name in modules if not any(model.get_submodule(name).children())}
    frozen = {n for n in now.parameters.keys() - whole if n.rpartition(".")[0] in layers}
    return HeldTask(
        plan,
        {name: kept(name, now.deltas[name].delta) for name in plan.unstructured},
        {
            name: {
                local: kept(f"{name} ({local})", getattr(now.structured[name], local))
                for local in structured_shapes(spec)
            }
            for name, spec in plan.structured.items()
        },
        {name: kept(name, trained[name]) for name in sorted(whole)},
        frozenset(frozen | plan.info.keys()).difference(plan.head),
    )


def _head(task: Task) -> dict[str, Tensor]:
    return {name: task.dense[name] for name in task.plan.head}


def fold(layer: LoraLayer, weight: Tensor) -> None:
    """`weight[rows] += scale · B A`, rounded once from fp32 or fp64; other rows keep their bits."""
    update = LoraLayer.update(layer).view_as(weight)  # of the wider of both dtypes
    for start, stop in layer.__dict__["_spt_spec"].rows:
        update[start:stop] += weight[start:stop]
        weight[start:stop] = update[start:stop]


def _change_tuning(model: nn.Module, **changes: Any) -> None:
    model.spt_tuning = replace(tuning_of(model), **changes)  # type: ignore[assignment]


def _kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    values = whole(tensor.detach()).cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinite values: the training diverged")
    if dtype == torch.float32:
        return values.clone()
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds values too large for {kind}: save in bfloat16 or float32")
    return rounded
