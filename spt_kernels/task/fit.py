"""Whether a task fits a model: its base by fingerprints, its shapes, its head, its structure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.quantized import logical_shape
from ..model.replaced_head import head_problem
from ..model.tied import identity_of
from ..plan import Plan
from .base_model import BaseModel, BaseTensor
from .file.fingerprint import Fingerprint
from .file.format import TaskFile
from .forward_state import base_buffers, buffer_problem
from .frozen import FrozenState
from .intact import dense_names, tuning_of


@dataclass(frozen=True, eq=False)
class Fit:
    """How a task fits a model.

    Attributes:
        problem: what is wrong with the model as the base of the task; None if nothing is.
        digests: parameter name -> fingerprint of its base values, as far as they were asked for.
    """

    problem: str | None
    digests: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        now: BaseModel,
        task: TaskFile,
        frozen: FrozenState | None,
        known: Mapping[str, Fingerprint] | None = None,
        *,
        check_base: bool = True,
    ) -> Fit:
        """Look at a model, plain or tuned.

        Args:
            model: the one to put the task on.
            now: what is where in it.
            task: to be put on.
            frozen: of a tuned model, whose base is taken to be as it is once written back.
            known: fingerprints of a plain model's base, where they were taken before.
            check_base: whether the base must have the values that the task was trained over.
        """
        shapes = {name: entry.shape for name, entry in task.base.items()}
        shapes |= {name: tuple(info.shape) for name, info in task.plan.info.items()}
        base = base_values(model, now, shapes.keys())
        for name, shape in shapes.items():
            if name not in base:
                made_for = f"(the task is for {task.model_name})"
                return cls(f"the model has no parameter {name} {made_for}", {})
            got = list(logical_shape(base[name][0]))
            if got != list(shape):
                return cls(f"{name}: expected shape {list(shape)}, got {got}", {})
        found = dict(known or {}) if frozen is None else dict(frozen.present)
        found |= Fingerprint.of_all({n: base[n] for n in task.base if n not in found})
        problem = _difference(task, found) if check_base else None
        problem = problem or _dense_problem(now, task) or _tied_problem(model, task)
        if problem is None:
            tuning = None if frozen is None else tuning_of(model)
            problem = buffer_problem(now, tuning, task)
        if problem is None:
            head = {name: task.dense[name] for name in task.plan.head}
            problem = head_problem(model, head, task.beside_head)
        return cls(problem, {name: fingerprint.digest for name, fingerprint in found.items()})


def base_values(model: nn.Module, now: BaseModel, names: Collection[str]) -> dict[str, BaseTensor]:
    """Parameters and buffers as they are in the base: without deltas, and the head as it was."""
    found = now.base_tensors(names)
    tuning = tuning_of(model) if hasattr(model, "spt_tuning") else None
    known: dict[str, Tensor] = base_buffers(now, tuning)
    if tuning is not None:
        known |= tuning.base_head
        for module_name, module in tuning.replaced_head.modules.items():
            own = module.named_parameters(recurse=False)
            known |= {f"{module_name}.{local}": parameter.detach() for local, parameter in own}
    return found | {name: (known[name], None, None) for name in known.keys() & names}


def has_same_structure(model: nn.Module, now: BaseModel, task: TaskFile) -> bool:
    """Whether a tuned model is tuned by a plan that differs from the task's in values alone."""
    ours, other = tuning_of(model).plan, task.plan
    whole, dense = now.parameters, dense_names(model, now)
    return (
        ours.head == other.head
        and _read_themselves(ours) == _read_themselves(other)
        and ours.structured == other.structured
        and ours.unstructured.keys() == other.unstructured.keys()
        and all(torch.equal(p, other.unstructured[n]) for n, p in ours.unstructured.items())
        and dense == task.dense.keys() - now.buffers.keys()
        and all(whole[name].shape == task.dense[name].shape for name in dense)
    )


def _difference(task: TaskFile, found: Mapping[str, Fingerprint]) -> str | None:
    for name, fingerprint in task.base.items():
        fits = [fingerprint, *([task.recast[name]] if name in task.recast else [])]
        if found[name] not in fits:
            # in words of the one of this dtype, if there is such
            nearest = next((f for f in fits if f.dtype == found[name].dtype), fingerprint)
            return f"{name}: {nearest.difference(found[name])}"
    return None


def _dense_problem(now: BaseModel, task: TaskFile) -> str | None:
    for name in task.dense.keys() - now.buffers.keys() - set(task.plan.head):
        if name not in now.parameters:
            return f"the model has no tensor {name} (the task is for {task.model_name})"
        got, expected = list(now.parameters[name].shape), list(task.dense[name].shape)
        if got != expected:
            return f"{name}: expected shape {expected}, got {got}"
    return None


def _tied_problem(model: nn.Module, task: TaskFile) -> str | None:
    """What was trained under several names, and is not one parameter here."""
    every = dict(model.named_parameters(remove_duplicate=False)) if task.tied else {}
    for name, others in task.tied.items():
        for other in others:
            one, same = every.get(name), every.get(other)
            if one is None or same is None or identity_of(one) != identity_of(same):
                return f"{other}: expected the same parameter as {name}, as it was trained, tied"
    return None


def _read_themselves(plan: Plan) -> set[str]:
    """What the model reads itself: it is trained where it is, and the layer of others is tuned."""
    return {name for name, info in plan.info.items() if info.is_read}
