"""A tuned model under DistributedDataParallel and fully_shard is trained as in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import spt_kernels as spt
from spt_kernels.distributed import Processes
from spt_kernels.distributed.sharded import is_sharded, local_part, local_rows, whole
from spt_kernels.errors import OtherProcessFailed
from spt_kernels.methods.tunable import plan_of
from spt_kernels.plan import Plan
from spt_kernels.task.file.format import read
from tests import models
from tests.models import tiny_batch

SIZES = (2,)  # but for what says otherwise
BATCH = 8  # that all sizes divide, as both wrappers average over processes
LR = 1e-2


def tiny_vit() -> nn.Module:
    return models.tiny_vit(depth=1)


@functools.cache
def made_plan(structured: str | None = "lora") -> Plan:
    measured = spt.measure_sensitivity(
        tiny_vit(), [tiny_batch(6)], num_samples=6, include=["cls_token"], progress=False
    )
    plan = spt.allocate(measured, 500, structured, rank=1, dropout=0.0)
    assert bool(plan.structured) == bool(structured)
    assert "cls_token" in plan.unstructured, "one that is read, in no layer that is called"
    return plan


def tuned(plan: Plan | None = None) -> nn.Module:
    return spt.apply(tiny_vit(), plan or made_plan()).train()


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def own_part(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    n = BATCH // dist.get_world_size()
    rows = slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)
    return batch[0][rows], batch[1][rows]


def optimizer_of(model: nn.Module) -> Optimizer:
    return spt.SparseAdamW(spt.param_groups(model, weight_decay=0.1), lr=LR)


def adamw_of(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LR)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: Iterable[int],
    *,
    share: bool = False,
    clip: float | None = None,
) -> None:
    for step in steps:
        batch = tiny_batch(BATCH, seed=step)
        images, labels = own_part(batch) if share else batch
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def assert_equal_parameters(model: nn.Module, truth: nn.Module) -> None:
    """Those trained, and those that hold base + delta, to what sums in another order round."""
    expected = dict(truth.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter.detach()), expected[name], rtol=1e-3, atol=1e-4)


def check_ddp_trains_as_one_process(place: Path) -> None:
    truth, model = tuned(), tuned()
    wrapped = DistributedDataParallel(model)
    train(truth, optimizer_of(truth), range(3))
    train(wrapped, optimizer_of(wrapped), range(3), share=True)
    assert_equal_parameters(model, truth)
    state = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    told = Processes.of(dist.group.WORLD).gather(state)
    assert all(torch.equal(other, state) for other in told)
    path = place / f"ddp-{dist.get_rank()}.safetensors"
    spt.save_delta(wrapped, path)
    spt.load_delta(wrapped, path)  # of the same structure: it stays valid
    train(wrapped, optimizer_of(wrapped), range(1), share=True)
    with pytest.raises(ValueError, match="data parallel"):
        spt.merge(wrapped)


def check_parts_are_computed_again_in_each_process(place: Path) -> None:
    truth, model, shards = tuned(), tuned(), sharded(tuned())
    assert spt.recompute(model, ("mlp", "qkv"))
    assert spt.recompute(shards, "block")
    wrapped = DistributedDataParallel(model)
    train(truth, optimizer_of(truth), range(3))
    train(wrapped, optimizer_of(wrapped), range(3), share=True)
    train(shards, optimizer_of(shards), range(3), share=True)
    assert_equal_parameters(model, truth)
    assert_equal_parameters(shards, truth)


def check_fully_shard_trains_as_one_process(place: Path) -> None:
    size = dist.get_world_size()
    kinds: list[tuple[Callable[[nn.Module], Optimizer], float | None]] = [
        (optimizer_of, 0.5),
        (adamw_of, None),
    ]
    for make, clip in kinds[: 4 // size]:
        truth, model = tuned(), sharded(tuned())
        train(truth, make(truth), range(3), clip=clip)
        train(model, make(model), range(3), share=True, clip=clip)
        assert_equal_parameters(model, truth)
        weight = model.blocks[0].mlp.fc1.weight
        assert local_part(weight).shape[0] == weight.shape[0] // size, "memory is what it is for"
        assert not weight.requires_grad
        with torch.no_grad():
            images, _ = tiny_batch(BATCH)
            expected = truth.eval()(images)
            torch.testing.assert_close(model.eval()(images), expected, rtol=0, atol=1e-4)


check_fully_shard_trains_as_one_process.sizes = (2, 4)


def check_a_task_is_saved_once_and_loaded_into_shards(place: Path) -> None:
    processes = Processes.of(dist.group.WORLD)
    truth, model = tuned(), sharded(tuned())
    train(truth, optimizer_of(truth), range(2))
    train(model, optimizer_of(model), range(2), share=True)
    own = place / f"truth-{processes.rank}.safetensors"
    path = place / "task.safetensors"
    spt.save_delta(truth, own)
    model.eval()(tiny_batch(2)[0])  # after which FSDP leaves gathered what is of no block
    size = spt.save_delta(model, path)
    assert size == path.stat().st_size
    ours, theirs = read(path), read(own)
    assert ours.base == theirs.base, "the fingerprints of the base"
    assert ours.plan == theirs.plan
    for name, values in theirs.values.items():
        torch.testing.assert_close(ours.values[name], values, rtol=1e-3, atol=1e-4)

    plain = spt.load_delta(tiny_vit(), path)
    assert_equal_parameters(model, plain)
    other = sharded(tuned())
    other(tiny_batch(2)[0])
    is_first, nowhere = processes.is_first, place / "nowhere" / "task.safetensors"
    with pytest.raises(FileNotFoundError if is_first else OtherProcessFailed, match="nowhere"):
        spt.load_delta(other, nowhere if is_first else path)
    spt.load_delta(other, path if is_first else nowhere)  # every process, each into its part
    for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert is_sharded(a), name
        assert torch.equal(local_part(a), local_part(b)), name
    train(other, optimizer_of(other), range(1), share=True)
    another = spt.apply(tiny_vit(), few_entries())
    spt.save_delta(another, place / f"few-{processes.rank}.safetensors")
    with pytest.raises(ValueError, match="load the task before fully_shard"):
        spt.load_delta(model, place / f"few-{processes.rank}.safetensors")
    with pytest.raises((OSError, RuntimeError), match="no such folder"):
        spt.save_delta(model, nowhere)
    for verb in (spt.merge, spt.unload):
        with pytest.raises(ValueError, match="fully_shard has dealt out"):
            verb(model)


def few_entries() -> Plan:
    """A matrix of which some processes have no trained entry, and hold no row of a bias."""
    some = {"blocks.0.mlp.fc1.weight": [3, 2100], "blocks.0.attn.proj.bias": [23]}
    return plan_of(tiny_vit(), {name: torch.tensor(own) for name, own in some.items()})


def check_processes_may_have_nothing_of_a_delta(place: Path) -> None:
    truth = tuned(few_entries())
    train(truth, optimizer_of(truth), range(2))
    # dealt out to all, and to two that two others double
    names = ("replicate", "shard")
    for mesh in (None, init_device_mesh("cpu", (2, 2), mesh_dim_names=names)):
        model = sharded(tuned(few_entries()), mesh=mesh)
        train(model, optimizer_of(model), range(2), share=True)
        assert_equal_parameters(model, truth)


check_processes_may_have_nothing_of_a_delta.sizes = (4,)


def check_half_precision(place: Path) -> None:
    # base and head of 16 bits, whose deltas and values are trained in 32
    model = sharded(spt.apply(tiny_vit().bfloat16(), made_plan(None)))
    images, labels = own_part(tiny_batch(BATCH))
    optimizer = optimizer_of(model)
    F.cross_entropy(model(images.bfloat16()).float(), labels).backward()
    optimizer.step()
    assert_shards_hold_base_and_delta(model, tiny_vit().bfloat16())
    # a base of 32 bits that computes in 16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(tuned(), mp_policy=policy)
    optimizer = optimizer_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
    assert_shards_hold_base_and_delta(model, tiny_vit())


def assert_shards_hold_base_and_delta(model: nn.Module, base: nn.Module) -> None:
    plain, tuned_parts = dict(base.named_parameters()), dict(model.named_parameters())
    for name, positions in model.spt_tuning.plan.unstructured.items():
        module, _, local = name.rpartition(".")
        delta, *_ = model.get_submodule(module).delta_local_names(local)
        expected = plain[name].detach().clone()
        change = whole(tuned_parts[f"{module}.{delta}".lstrip(".")].detach())
        assert change.abs().min() > 0, "it is trained"
        expected.view(-1)[positions] = (expected.view(-1)[positions].float() + change).to(expected)
        rows = slice(*local_rows(tuned_parts[name]))
        assert torch.equal(local_part(tuned_parts[name]), expected[rows]), name


def check_what_cannot_be_is_refused(place: Path) -> None:
    model = sharded(tuned())
    groups = spt.param_groups(model)
    rounding = spt.SparseAdamW(groups, lr=LR, stochastic_rounding=True)
    with pytest.raises(ValueError, match="stochastic_rounding: expected False"):
        train(model, rounding, range(1), share=True)
    optimizer = adamw_of(model)
    train(model, optimizer, range(1), share=True)
    optimizer.zero_grad()
    F.cross_entropy(
        model(own_part(tiny_batch(BATCH))[0]), own_part(tiny_batch(BATCH))[1]
    ).backward()
    model(tiny_batch(2)[0])
    with pytest.raises(RuntimeError, match="call reshard"):
        optimizer.step()
    early = tuned()
    optimizers = optimizer_of(early), adamw_of(early)
    sharded(early)
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match="the optimizer was made before fully_shard"):
            train(early, optimizer, range(1), share=True)
    full = states.StateDictOptions(full_state_dict=True, strict=False)
    state = states.get_model_state_dict(model, options=full)
    states.set_model_state_dict(model, dict(state), options=full)
    cut = {name: value for name, value in state.items() if not name.endswith("_original")}
    with pytest.raises(RuntimeError, match="which broadcast_from_rank0 does not"):
        states.set_model_state_dict(model, cut, options=full)
    plain = sharded(tiny_vit())
    with pytest.raises(ValueError, match="apply the plan to the model first"):
        spt.apply(plain, made_plan())
    with pytest.raises(ValueError, match="measure the model first"):
        spt.measure_sensitivity(plain, [tiny_batch(2)], num_samples=2, progress=False)


def check_a_checkpoint_goes_on_in_another_number_of_processes(place: Path) -> None:
    # two processes leave it, and the four that come after go on with it
    from torch.distributed import checkpoint

    folder = place.parent / "checkpoint"
    some = states.StateDictOptions(ignore_frozen_params=True)
    model = sharded(tuned())
    optimizer = optimizer_of(model)

    def state_of() -> dict[str, Any]:
        own, steps = states.get_state_dict(model, optimizer, options=some)
        return {"model": own, "optimizer": steps}

    if dist.get_world_size() == 2:
        train(model, optimizer, range(3), share=True)
        checkpoint.save(state_of(), checkpoint_id=folder)
        return
    state = state_of()
    checkpoint.load(state, checkpoint_id=folder)
    states.set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=states.StateDictOptions(strict=False),
    )
    truth = tuned()
    steps = optimizer_of(truth)
    train(truth, steps, range(3))
    assert_equal_parameters(model, truth)
    train(truth, steps, range(3, 5))
    train(model, optimizer, range(3, 5), share=True)
    assert_equal_parameters(model, truth)
    moments = [s for group in (optimizer, steps) for s in group.state.values()]
    assert all(is_sharded(s["exp_avg"]) for s in moments[: len(moments) // 2])
    assert all(float(s["step"]) == 5 for s in moments)


check_a_checkpoint_goes_on_in_another_number_of_processes.sizes = (2, 4)
