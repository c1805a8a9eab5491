"""A quantized base in several processes: measured together, trained by copies, never sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import spt_kernels as spt
from spt_kernels.distributed import Processes
from spt_kernels.model.quantized import quantized_names
from tests import models
from tests.models import tiny_batch
from tests.quantized import quantize

from .check_data_parallel import optimizer_of, train

SIZES = (2,)


def base() -> nn.Module:
    return quantize(models.tiny_vit(depth=1))


def measured(own: slice, n: int, group: object = None) -> spt.Sensitivity:
    images, labels = (part[own] for part in tiny_batch(n))
    batches = [(images, labels)] if len(images) else []
    return spt.measure_sensitivity(base(), batches, num_samples=n, progress=False, group=group)


def tuned() -> nn.Module:
    plan = spt.allocate(measured(slice(6), 6), 500, "lora", rank=1, dropout=0.0)
    return spt.apply(base(), plan).train()


def check_scores_are_those_of_one_process(place: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for n in (5, 1):  # of which the second process has its share, or nothing
        alone = measured(slice(n), n)
        shared = measured(slice(rank, n, size), n, dist.group.WORLD)
        assert shared.info == alone.info
        for name, score in shared.items():
            torch.testing.assert_close(score, alone[name], rtol=2e-5, atol=1e-9)


def check_another_quantization_in_one_process_is_noticed(place: Path) -> None:
    model = base()
    if dist.get_rank():
        model.blocks[0].mlp.fc1.weight.levels[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"blocks\.0\.mlp\.fc1\.weight is another one in process 1"
    ):
        spt.measure_sensitivity(
            model, [tiny_batch(2)], num_samples=2, progress=False, group=dist.group.WORLD
        )


def check_ddp_trains_as_one_process(place: Path) -> None:
    truth, model = tuned(), tuned()
    # as docs/QUANTIZED.md has it
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    wrapped = DistributedDataParallel(model)
    train(truth, optimizer_of(truth), range(3))
    train(wrapped, optimizer_of(wrapped), range(3), share=True)
    expected = dict(truth.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)
    values = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    told = Processes.of(dist.group.WORLD).gather(values)
    assert all(torch.equal(other, values) for other in told)


def check_shards_are_refused_by_name(place: Path) -> None:
    model = tuned()
    weights = {model.get_parameter(name) for name in quantized_names(model)}
    message = r"blocks\.0\.\S+ has a quantized weight and cannot be sharded: train it under Distr"
    with pytest.raises(ValueError, match=message):
        fully_shard(model.blocks[0], ignored_params=weights)
