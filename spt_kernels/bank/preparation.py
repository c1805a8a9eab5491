"""The content of a task file as a base model takes it: checked, cast, moved to its device."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping

import torch
from torch import Tensor

from ..layers.autograd.row_ranges import ranges_of
from ..model.replaced_head import misfits
from ..ops.write_delta import check_layout
from ..task.file.format import TaskFile
from ..task.forward_state import buffers_of
from ..tuning.places import Place, check_places, places_of
from .banked_task import BankedTask, Positions, SparsePart, StructuredPart
from .base import Base

_ADVICE = (
    ": give the model its usual memory format, model.to(memory_format=torch.contiguous_format), "
    "before it gets a bank"
)

SharedPositions = MutableMapping[tuple[str, bytes], Positions]


@torch.inference_mode(False)
@torch.no_grad()
def banked(
    task: TaskFile, base: Base, current: BankedTask | None, shared: SharedPositions
) -> BankedTask:
    """A task, which `Fit` found fitting, as the base model takes it.

    Args:
        task: of a file.
        base: the model, which is only read.
        current: the task that it has on at the moment.
        shared: (parameter name, digest) -> positions that other tasks have; added to.

    Raises:
        ValueError: a parameter cannot be written as the task has it.
        TypeError: a parameter is of a dtype that is not served.
    """
    parameters = base.now.parameters
    structure = base.structure
    places = places_of(structure, task.plan, parameters, set())
    check_places(list(structure.named_parameters(remove_duplicate=False)), places, task.plan.head)
    buffers = buffers_of(task, base.now)
    like = next(iter(parameters.values()))
    whole = {
        name: value.to(parameters.get(name, like), copy=True)
        for name, value in task.dense.items()
        if name not in buffers
    }
    head = {name: whole[name] for name in task.plan.head}
    held = BankedTask(
        sparse=_sparse_parts(task, base, places, current, shared),
        structured={
            name: StructuredPart(
                spec,
                ranges_of(spec.rank, spec.rows),
                {
                    local: part.to(parameters[name].device, torch.float32)
                    for local, part in task.structured[name].items()
                },
            )
            for name, spec in task.plan.structured.items()
        },
        whole=whole,
        head=task.plan.head,
        elsewhere=task.beside_head,
        replaced=frozenset(misfits(base.modules.get, head, task.beside_head)),
        buffers={name: value.clone() for name, value in buffers.items()},
        classes=tuple(task.metadata.get("classes", ())),
        read=frozenset(p.name for p in places if p.reads_itself or "forward" in vars(p.module)),
    )
    for name in held.sparse:
        if name.rpartition(".")[0] in held.replaced:
            raise ValueError(f"{name} has a sparse delta in a head of another size than the base's")
    for name in whole.keys() & parameters.keys():
        if whole[name].shape == parameters[name].shape:
            base.remember(name, current)
    return held


def _sparse_parts(
    task: TaskFile,
    base: Base,
    places: list[Place],
    current: BankedTask | None,
    shared: SharedPositions,
) -> dict[str, SparsePart]:
    found: dict[str, SparsePart] = {}
    for place in places:
        for local, checked in place.positions.items():
            name = f"{place.name}.{local}" if place.name else local
            check_layout(name, base.now.parameters[name], _ADVICE)
            if len(checked.index):
                positions = _positions(name, checked.index, base, current, shared)
                delta = task.values[name].to(checked.index.device, torch.float32)
                tuned = (positions.base.float() + delta).to(positions.base.dtype)
                found[name] = SparsePart(positions, tuned)
    return found


def _positions(
    name: str, index: Tensor, base: Base, current: BankedTask | None, shared: SharedPositions
) -> Positions:
    key = name, hashlib.blake2b(index.cpu().numpy().tobytes(), digest_size=16).digest()
    found = shared.get(key)
    if found is None:
        found = Positions(index, base.gather(name, index, current))
        shared[key] = found
    return found
