"""Tensors that FSDP2 has sharded by rows (`DTensor`): the part here, and the whole.

Nothing is imported of `torch.distributed.tensor` before something has made such a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .processes import Processes
from .sum import all_gather


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this process may have a part alone."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharers(model: nn.Module) -> Processes:
    """The processes that a model is dealt out over; this one alone where it is whole."""
    # over which of them the parameters are dealt out is told by no one tensor
    return Processes.of_all() if any(map(is_sharded, model.parameters())) else Processes()


def reshard(model: nn.Module) -> None:
    """Let FSDP put its shards where it has left what a forward gathered; nothing without FSDP."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        for part in model.modules():
            if isinstance(part, module.FSDPModule):
                part.reshard()


@torch.no_grad()
def local_part(tensor: Any) -> Tensor:
    """What this process has of a tensor, in the same memory; the tensor itself where it is all."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """All of a tensor; every process that has a part of it must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_rows(tensor: Any) -> tuple[int, int]:
    """Which rows of a sharded tensor this process has: from, and up to.

    Raises:
        ValueError: it is sharded in another way than by rows.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _row_dimension(tensor)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def group_of_rows(tensor: Any) -> Any:
    """The processes among which the rows of a tensor are dealt out; None where each has all."""
    dimension = _row_dimension(tensor) if is_sharded(tensor) else None
    return None if dimension is None else tensor.device_mesh.get_group(dimension)


@torch.no_grad()
def put_whole(target: Any, values: Tensor) -> None:
    """Copy all values of a tensor into it, of which each process takes its part."""
    if is_sharded(target) and not is_sharded(values):
        start, stop = local_rows(target)
        local_part(target).copy_(values[start:stop])
    else:
        target.copy_(values)


@torch.no_grad()
def whole_vectors(vectors: Sequence[Any]) -> list[Tensor]:
    """All of each of many vectors, in one exchange for those that are sharded alike."""
    found: list[Tensor] = [local_part(vector) for vector in vectors]
    alike: dict[tuple[Any, int], list[int]] = {}
    for n, vector in enumerate(vectors):
        if is_sharded(vector) and (dimension := _row_dimension(vector)) is not None:
            alike.setdefault((vector.device_mesh, dimension), []).append(n)
    for (mesh, dimension), chosen in alike.items():
        group, size = mesh.get_group(dimension), mesh.size(dimension)
        parts = [-(-vectors[n].numel() // size) for n in chosen]  # of which the last are shorter
        own = found[chosen[0]].new_zeros(sum(parts))
        for n, room in zip(chosen, own.split(parts), strict=True):
            room[: found[n].numel()] = found[n]
        every = own.new_empty(size, sum(parts))
        all_gather(every.view(-1), own, group)
        for n, columns in zip(chosen, every.split(parts, 1), strict=True):
            found[n] = columns.reshape(-1)[: vectors[n].numel()].contiguous()
    return found


def _row_dimension(tensor: Any) -> int | None:
    """The dimension of the mesh along which a tensor's rows are dealt out; None: all has all."""
    from torch.distributed.tensor import Replicate, Shard

    kinds = tensor.placements
    over = [n for n, kind in enumerate(kinds) if type(kind) is Shard and kind.dim == 0]
    others = [kind for kind in kinds if type(kind) not in (Shard, Replicate)]
    if others or len(over) > 1 or any(type(k) is Shard and k.dim != 0 for k in kinds):
        raise ValueError(
            f"a tuned parameter of shape {tuple(tensor.shape)} is placed as {tuple(kinds)}: "
            "expected rows dealt out along one dimension of the mesh, as fully_shard does"
        )
    return over[0] if over else None
