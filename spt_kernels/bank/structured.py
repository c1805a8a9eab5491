"""LoRA and Adapter parts of several tasks on one matrix, each for its own samples of a batch.

Samples whose tasks have the same kind, rank and ranges there are served together, by products of a
batch of matrices. The arithmetic of each is that of `LoraLinear` and `AdapterLinear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.autograd.autocast import without_autocast
from ..layers.autograd.row_ranges import Ranges
from ..plan import AdapterSpec, LoraSpec
from .banked_task import StructuredPart


@dataclass(frozen=True, eq=False)
class StructuredGroup:
    """Parts of one form, and whose samples they are for.

    Attributes:
        spec: kind, rank, ranges, and scale of a LoRA.
        ranges: of the spec.
        tensors: by their names in the layer, `[samples or 1, ...]`: a matrix for each sample.
        samples: int64 `[samples]`: which of the batch; None for all of it, with one matrix.
    """

    spec: LoraSpec | AdapterSpec
    ranges: Ranges
    tensors: dict[str, Tensor]
    samples: Tensor | None


def group_of_one(part: StructuredPart) -> StructuredGroup:
    """The part of the one task that a whole batch is for."""
    tensors = {name: tensor[None] for name, tensor in part.tensors.items()}
    return StructuredGroup(part.spec, part.ranges, tensors, None)


def groups_of(
    parts: Sequence[StructuredPart | None], counts: Sequence[int]
) -> tuple[StructuredGroup, ...]:
    """The parts of several tasks on one matrix.

    Args:
        parts: of each task in the order of its samples; None where it has none.
        counts: samples of each.
    """
    by_form: dict[object, list[int]] = {}
    for n, part in enumerate(parts):
        if part is not None:
            by_form.setdefault(_form(part.spec), []).append(n)
    groups = []
    for members in by_form.values():
        chosen = [part for n in members if (part := parts[n]) is not None]
        device = next(iter(chosen[0].tensors.values())).device
        own = [counts[n] for n in members]
        which = each_times(own, device)
        starts = [sum(counts[:n]) for n in members]
        ranges = [range(a, a + count) for a, count in zip(starts, own, strict=True)]
        tensors = {
            name: torch.stack([part.tensors[name] for part in chosen]).index_select(0, which)
            for name in chosen[0].tensors
        }
        samples = torch.tensor([n for some in ranges for n in some], device="cpu").to(device)
        groups.append(StructuredGroup(chosen[0].spec, chosen[0].ranges, tensors, samples))
    return tuple(groups)


def each_times(counts: Sequence[int], device: torch.device) -> Tensor:
    """The number of each count, as often as that says: int64 `[sum(counts)]`."""
    numbers = [n for n, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(numbers, device="cpu").to(device)


def add_structured(
    module: nn.Module, x: Tensor, y: Tensor, groups: Sequence[StructuredGroup], n_samples: int
) -> None:
    """Add to the output of a layer what LoRAs make of its input and Adapters of its output.

    Args:
        module: a Linear, or a 1×1 Conv2d.
        x: its input, which has the samples of the batch one after another.
        y: its output, mutated.
        groups: the parts, one for each sample at most.
        n_samples: in the batch.
    """
    if isinstance(module, nn.Conv2d):
        down, right = module.stride
        x, y = x[..., ::down, ::right].movedim(-3, -1), y.movedim(-3, -1)
    x = x.to(y.dtype)
    with without_autocast(y.device):
        for group in groups:
            n = n_samples if group.samples is not None else 1
            inputs = x.reshape(n, -1, x.shape[-1])  # [samples, tokens, in]
            if isinstance(group.spec, AdapterSpec):
                inputs = y.reshape(n, -1, y.shape[-1])
            if group.samples is not None:
                inputs = inputs.index_select(0, group.samples)
            for rows, own, part in group.ranges:
                if isinstance(group.spec, LoraSpec):
                    update = _lora(inputs, group, own, part)
                else:
                    update = _adapter(inputs[..., rows], group, own, part)
                _add(y[..., rows], update, group.samples, n)


def _lora(inputs: Tensor, group: StructuredGroup, own: slice, part: slice) -> Tensor:
    """`scale · B A x`: `[samples, tokens, rows]`."""
    assert isinstance(group.spec, LoraSpec)
    down = group.tensors["lora_a"][:, part].to(inputs.dtype)
    up = group.tensors["lora_b"][:, own].to(inputs.dtype)
    return torch.bmm(torch.bmm(inputs, down.mT), up.mT).mul_(group.spec.scale)


def _adapter(inputs: Tensor, group: StructuredGroup, own: slice, part: slice) -> Tensor:
    """`Up(GELU(Down(y)))`: `[samples, tokens, rows]`."""
    down, bias, up, up_bias = (
        group.tensors[name].to(inputs.dtype)
        for name in ("down_weight", "down_bias", "up_weight", "up_bias")
    )
    low = torch.baddbmm(bias[:, None, part], inputs, down[:, :, own].mT)
    return torch.baddbmm(up_bias[:, None, own], F.gelu(low), up[:, own].mT)


def _add(output: Tensor, update: Tensor, samples: Tensor | None, n_samples: int) -> None:
    """Add `[samples, tokens, rows]` to the rows `[..., rows]` of an output, in place."""
    if samples is None:
        output.add_(update.view(output.shape))
        return
    per_sample = output.unflatten(0, (n_samples, -1))
    per_sample.index_add_(0, samples, update.view(len(samples), *per_sample.shape[1:]))


def _form(spec: LoraSpec | AdapterSpec) -> object:
    """What parts must have in common to be served together."""
    scale = spec.scale if isinstance(spec, LoraSpec) else None
    return spec.kind, spec.rank, spec.rows, scale
