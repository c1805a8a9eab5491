"""Whatever torch's default device and dtype are, a task is made, trained and read as ever."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from tests.methods.every import tuned
from tests.models import tiny_batch, tiny_vit

BATCH = tiny_batch(4)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def task(base: nn.Module, kind: str | None, folder: Path) -> tuple[spt.Plan, Tensor]:
    """The plan, and what the model gives that was trained by it, and reads what was saved."""
    images, labels = BATCH
    model = copy.deepcopy(base)
    measured = spt.measure_sensitivity(model, [(images, labels)], num_samples=4, progress=False)
    from_block = 1 if kind is None else None
    plan = spt.allocate(measured, 800, kind, rank=1, from_block=from_block)
    plan.save(folder / "plan")
    assert spt.Plan.load(folder / "plan") == plan
    assert plan.summary()
    torch.manual_seed(1)
    spt.apply(model, plan)
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    spt.save_delta(model, folder / "task")
    again = copy.deepcopy(base)
    spt.load_delta(again, folder / "task")
    assert torch.equal(again.eval()(images), model.eval()(images))
    return plan, model(images).detach()


@pytest.mark.parametrize("kind", ["lora", "adapter", None])
@pytest.mark.parametrize("default", ["meta", "bfloat16", "float64"])
def test_a_task(kind: str | None, default: str, tmp_path: Path) -> None:
    base = tiny_vit()
    plan, outputs = task(base, kind, tmp_path)
    is_device = default == "meta"
    with torch.device("meta") if is_device else default_dtype(getattr(torch, default)):
        found, own_outputs = task(base, kind, tmp_path)
    assert found == plan
    assert torch.equal(own_outputs, outputs)


@pytest.mark.parametrize(
    "name",
    ["adaptformer", "mlp-2", "prompt-deep", "noah", "lora-2", "adapter-2"],
)
@pytest.mark.parametrize("default", ["meta", "bfloat16"])
def test_a_method(name: str, default: str) -> None:
    bases = tiny_vit(), tiny_vit()
    torch.manual_seed(0)
    expected = tuned(name, bases[0]).model.state_dict()
    with torch.device("meta") if default == "meta" else default_dtype(torch.bfloat16):
        torch.manual_seed(0)
        found = tuned(name, bases[1]).model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
