"""Top-τ of scores in several processes is that of the same scores in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import spt_kernels as spt
from spt_kernels.distributed import Processes
from spt_kernels.errors import OtherProcessFailed
from spt_kernels.ops import shared_top_tau
from spt_kernels.reference import top_tau as reference
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit


def everyones(seed: int, kind: str) -> list[list[Tensor]]:
    """The parts of four tensors, by rank; some are empty, and some have mostly ties."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = []
    for rank in range(dist.get_world_size()):
        sizes = torch.randint(0, 40, (4,), generator=generator).tolist()
        sizes[rank % 4] = 0
        scores = [torch.randn(n, generator=generator).exp() for n in sizes]
        if kind == "ties":
            scores = [torch.randint(0, 4, (n,), generator=generator).float() for n in sizes]
        elif kind == "bf16":
            scores = [score.bfloat16() for score in scores]
        elif kind == "wide":  # every digit of the bits decides somewhere
            scores = [s.pow(20) * 1e-30 for s in scores]
        parts.append(scores)
    return parts


def truth(parts: list[list[Tensor]], k: int, caps: list[int], rank: int) -> list[Tensor]:
    """What one process selects of the parts joined by rank, as positions in those of `rank`."""
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    chosen = reference.top_tau(joined, k, caps)
    own = []
    for m, positions in enumerate(chosen):
        first = sum(scores[m].numel() for scores in parts[:rank])
        stop = first + parts[rank][m].numel()
        own.append(positions[(positions >= first) & (positions < stop)] - first)
    return own


def check_selects_what_one_process_selects(place: Path) -> None:
    rank = dist.get_rank()
    for seed, kind in enumerate(["any", "ties", "bf16", "wide"]):
        parts = everyones(seed, kind)
        positives = [sum(int((p[m] > 0).sum()) for p in parts) for m in range(4)]
        some = torch.randint(0, 30, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        for caps in (None, some):
            limits = [2**62] * 4 if caps is None else caps
            most = sum(map(min, positives, limits))
            for k in (0, 1, most // 2, most):
                found = shared_top_tau(parts[rank], k, caps, group=dist.group.WORLD)
                expected = truth(parts, k, limits, rank)
                assert all(map(torch.equal, found, expected)), (kind, caps, k)


def check_a_plan_of_sharded_scores_is_that_of_whole_ones(place: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = skewed_sensitivity(tiny_vit())
    assert any(len(info.row_blocks) == 3 for info in whole.info.values()), "a fused qkv"
    parts = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in whole.items()}
    sharded = replace(whole, scores=parts)
    for budget in (300, 1400):  # all that can be had is 1536
        plan = spt.allocate(sharded, budget, rank=1)
        assert plan == spt.allocate(whole, budget, rank=1)
        assert plan.structured
    with pytest.raises(ValueError, match="needs scores that are whole"):
        spt.allocate(sharded, 700, rule="published-code")
    name = next(iter(parts))
    with pytest.raises(ValueError, match="some scores are sharded and others are not"):
        spt.allocate(replace(whole, scores={**whole.scores, name: parts[name]}), 700)
    with pytest.raises(ValueError, match="positive scores can be counted"):
        spt.allocate(sharded, 10**6)


def check_bad_scores_are_told_to_all(place: Path) -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    group = dist.group.WORLD
    scores = [torch.ones(3), torch.ones(2)]
    if rank == last:
        scores[1][1] = torch.nan
    with pytest.raises(ValueError if rank == last else OtherProcessFailed, match="fc2 holds 1 NaN"):
        shared_top_tau(scores, 2, group=group, names=["fc1", "fc2"])
    n = Processes.of(group).size
    with pytest.raises(ValueError, match=f"only {3 * n} positive scores can be counted"):
        shared_top_tau([torch.ones(3), torch.zeros(2)], 3 * n + 1, group=group)
    with pytest.raises(ValueError, match=f"process {last} has k"):
        shared_top_tau([torch.ones(3)], 3 if rank == last else 2, group=group)


check_bad_scores_are_told_to_all.sizes = (2,)
