"""Sums over processes that are the same, to the bit, on each of them and with every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PIECE = 2**23  # elements that travel at once: what is in flight stays small beside a model


@torch.no_grad()
def sum_in_place(tensors: Sequence[Tensor], group: Any) -> None:
    """Add up each tensor over the processes of a group, in place, in the order of ranks.

    Each process gets a part of everything from all others, adds these up one after the other, and
    gives the sum to all. That moves what a ring moves, `2 (size - 1) / size` times the tensors in
    and out of every process, but the result hangs on the number of processes alone: not on the
    backend, its algorithm, or who was first.

    Args:
        tensors: contiguous, mutated; of the same shapes and dtypes in every process.
        group: of `torch.distributed`.
    """
    size = dist.get_world_size(group)
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    for kind in dict.fromkeys(kinds):
        alike = [tensor for tensor, own in zip(tensors, kinds, strict=True) if own == kind]
        for pieces in _batches(alike):
            _sum_pieces(pieces, size, device_for(pieces[0], group), group)


def all_gather(into: Tensor, own: Tensor, group: Any) -> None:
    """Put what each process of a group has, all of one shape, one after the other into a vector."""
    # as newer versions of torch call it, which warn of the other name
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(into, own.contiguous(), group=group)


def device_for(tensor: Tensor, group: Any) -> torch.device:
    """Where a tensor has to be for a group to move it: where it is, if the group can do that."""
    pairs = dist.get_backend_config(group).split(",")  # as "cpu:gloo,cuda:nccl"
    kinds = [pair.partition(":")[0] for pair in pairs]
    return tensor.device if tensor.device.type in kinds else torch.device(kinds[0])


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat views of all elements, in lists of about `_PIECE` elements."""
    batch: list[Tensor] = []
    numel = 0
    flat = [tensor.view(-1) for tensor in tensors if tensor.numel()]
    # most are small, and to split one takes longer than all else
    for piece in (p for t in flat for p in (t.split(_PIECE) if len(t) > _PIECE else (t,))):
        if numel + piece.numel() > _PIECE:
            yield batch
            batch, numel = [], 0
        batch.append(piece)
        numel += piece.numel()
    if batch:
        yield batch


def _sum_pieces(pieces: list[Tensor], size: int, device: torch.device, group: Any) -> None:
    sizes = [piece.numel() for piece in pieces]
    part = -(-sum(sizes) // size)  # elements that each process adds up
    mine = torch.zeros(part * size, dtype=pieces[0].dtype, device=device)
    torch.cat([piece.to(device) for piece in pieces], out=mine[: sum(sizes)])
    parts = torch.empty_like(mine)
    dist.all_to_all_single(parts, mine, group=group)
    own, *others = parts.view(size, part)
    for other in others:  # one by one: `sum(0)` may add in another order
        own += other
    all_gather(mine, own, group)
    *summed, _ = mine.split([*sizes, len(mine) - sum(sizes)])
    torch._foreach_copy_(pieces, summed)
