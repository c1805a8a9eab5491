"""What forwards change in a model, buffers such as running statistics: part of base and task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.buffers import set_buffer
from ..tuning import Tuning
from .base_model import BaseModel
from .file.fingerprint import Fingerprint
from .file.format import TaskFile


def changed_buffers(now: BaseModel, tuning: Tuning) -> dict[str, Tensor]:
    """Name -> buffer that is no longer, to the last bit, what it was before tuning."""
    here: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    for name, base in tuning.base_buffers.items():
        buffer = now.buffers[name]
        if buffer is not None:
            here[name] = buffer.detach()
            if base is not None:
                before[name] = base.to(buffer)
    prints = [
        Fingerprint.of_all({name: (_real(t[name]), None, None) for name in before})
        for t in (here, before)
    ]
    same = {name for name in before if prints[0][name] == prints[1][name]}
    return {name: buffer for name, buffer in here.items() if name not in same}


def base_buffers(now: BaseModel, tuning: Tuning | None) -> dict[str, Tensor]:
    """Name -> floating buffer as it is in the base, where its values can tell bases apart."""
    before = now.buffers if tuning is None else tuning.base_buffers
    return {
        name: buffer.detach()
        for name, buffer in before.items()
        if buffer is not None and buffer.is_floating_point() and buffer.numel()
    }


def buffers_of(task: TaskFile, now: BaseModel) -> dict[str, Tensor]:
    """The buffers in a task file, for a model: those of format version 2 are among `dense`."""
    older = {name: task.dense[name] for name in task.dense.keys() & now.buffers.keys()}
    return {**older, **task.buffers}


def buffer_problem(now: BaseModel, tuning: Tuning | None, task: TaskFile) -> str | None:
    """Why a model cannot take the buffers of a task; None if it can."""
    before = now.buffers if tuning is None else tuning.base_buffers
    for name, value in buffers_of(task, now).items():
        if name not in now.owners:
            return f"the model has no buffer {name} (the task is for {task.model_name})"
        base = before.get(name)
        if base is None:
            continue
        if base.shape != value.shape:
            return f"{name}: expected shape {list(value.shape)}, got {list(base.shape)}"
        if base.is_floating_point() != value.is_floating_point():
            return f"{name}: expected {value.dtype}, got {base.dtype}"
    return None


@torch.no_grad()
def set_buffers(now: BaseModel, values: Mapping[str, Tensor | None]) -> None:
    """Give buffers of a model other values, where they lie if they can stay there."""
    for name, value in values.items():
        set_buffer(*now.owners[name], value)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
