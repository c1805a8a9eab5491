"""A sensitivity that processes measure together is that of one process, everywhere the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.distributed import Processes
from spt_kernels.errors import OtherProcessFailed
from tests.models import tiny_batch, tiny_vit

BUDGET = 700


def everyones(value: object) -> list[object]:
    return Processes.of(dist.group.WORLD).gather(value)


def batches_of(own: slice, n: int = 13) -> list[tuple[Tensor, Tensor]]:
    """Some of `n` samples, three to a batch."""
    images, labels = (part[own] for part in tiny_batch(n))
    return list(zip(images.split(3), labels.split(3), strict=True)) if len(images) else []


def own_batches(n: int = 13) -> list[tuple[Tensor, Tensor]]:
    return batches_of(slice(dist.get_rank(), n, dist.get_world_size()), n)


def measure(batches: list[tuple[Tensor, Tensor]], n: int, **options: object) -> spt.Sensitivity:
    return spt.measure_sensitivity(
        tiny_vit(), batches, F.cross_entropy, n, progress=False, **options
    )


def bits_of(measured: spt.Sensitivity) -> bytes:
    return b"".join(score.numpy().tobytes() for score in measured.values())


def check_scores_are_those_of_one_process(place: Path) -> None:
    group = dist.group.WORLD
    for n in (13, 11):  # neither falls to the processes evenly
        alone = measure(batches_of(slice(n), n), n)
        shared = measure(own_batches(n), n, group=group)
        assert shared.num_samples == n
        assert (shared.head, shared.info) == (alone.head, alone.info)
        assert shared.backbone_numel == alone.backbone_numel
        for name, score in shared.items():
            torch.testing.assert_close(score, alone[name], rtol=2e-5, atol=1e-9)
        assert len(set(everyones(bits_of(shared)))) == 1, "the same bits everywhere"
        plan = spt.allocate(shared, BUDGET, rank=1)
        assert plan.structured
        assert plan.num_unstructured
        assert all(other == plan for other in everyones(plan))


def check_processes_without_samples_help_to_sum(place: Path) -> None:
    alone = measure(batches_of(slice(0, 2)), 2)
    # the share of all but the first one or two is nothing, or there is nothing in their batches
    is_first = dist.get_rank() == 0
    for n, own in ((1, own_batches()), (2, batches_of(slice(0, 2) if is_first else slice(0)))):
        shared = measure(own, n, group=dist.group.WORLD)
        assert shared.num_samples == 1, "a share of one, of which the others have none"
        assert list(shared) == list(alone)
        assert shared.head == alone.head
        assert len(set(everyones(bits_of(shared)))) == 1
        first = measure(batches_of(slice(0, 1)), 1)
        for name, score in shared.items():
            torch.testing.assert_close(score, first[name])


check_processes_without_samples_help_to_sum.sizes = (4,)


def check_an_error_in_one_is_an_error_in_all(place: Path) -> None:
    rank = dist.get_rank()
    own = own_batches()
    if rank == 1:
        own[0][0][0, 0, 0, 0] = torch.nan
    expected = ValueError if rank == 1 else OtherProcessFailed
    with pytest.raises(expected, match="the loss is nan") as raised:
        measure(own, 13, group=dist.group.WORLD)
    assert rank == 1 or str(raised.value).startswith("process 1 cannot go on")
    with pytest.raises(ValueError, match="in any process"):
        measure([], 13, group=dist.group.WORLD)


check_an_error_in_one_is_an_error_in_all.sizes = (2,)


def check_models_and_arguments_that_differ_are_refused(place: Path) -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model = tiny_vit()
    if rank == last:
        model.norm.bias.data[3] += 1
    with pytest.raises(ValueError, match=f"norm.bias is another one in process {last}"):
        spt.measure_sensitivity(
            model, own_batches(), num_samples=13, progress=False, group=dist.group.WORLD
        )
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(1024, 5))
    if rank == last:
        net[1].running_mean += 1  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"1.running_mean is another one in process {last}"):
        spt.measure_sensitivity(
            net, own_batches(), num_samples=13, progress=False, group=dist.group.WORLD
        )
    exclude = ["blocks.1.*"] if rank == last else []
    with pytest.raises(ValueError, match=f"process {last} has found|process {last} has measured"):
        measure(own_batches(), 13, exclude=exclude, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="num_samples: expected the same in all processes, got"):
        measure(own_batches(), 13 + (rank == last), group=dist.group.WORLD)


check_models_and_arguments_that_differ_are_refused.sizes = (2,)
