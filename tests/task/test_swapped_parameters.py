"""Tuned models whose parameters torch swaps, or overwrites, where a model is moved or cast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spt_kernels as spt
from tests.models import tiny_batch, tiny_vit
from tests.task.test_delta import make_plan, predict


@pytest.fixture(params=["swap", "overwrite"])
def conversion(request: pytest.FixtureRequest) -> Iterator[str]:
    future: Any = torch.__future__
    name = "swap_module_params" if request.param == "swap" else "overwrite_module_params"
    change = getattr(future, f"set_{name}_on_conversion")
    change(True)
    yield request.param
    change(False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    images, labels = tiny_batch()
    optimizer.zero_grad()
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    F.cross_entropy(model(images.to(dtype)).float(), labels).backward()
    optimizer.step()


def made(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    groups = spt.param_groups(model)
    return spt.SparseAdamW(groups, lr=1e-2) if kind == "ours" else torch.optim.AdamW(groups)


@pytest.mark.parametrize("optimizer", ["ours", "torch"])
@pytest.mark.parametrize("kind", ["unstructured", "lora", "adapter"])
def test_a_tuned_model_is_cast_there_and_back(
    kind: str, optimizer: str, conversion: str, tmp_path: Path
) -> None:
    model = tiny_vit()
    spt.apply(model, make_plan(model, kind))
    run = made(model, optimizer)
    for _ in range(3):
        step(model, run)
    trained = predict(model, "vit")
    model.double()
    torch.testing.assert_close(predict(model.float(), "vit"), trained, rtol=0, atol=0)
    if conversion == "overwrite":
        run = made(model, optimizer)  # there are other parameters now
    for _ in range(3):
        step(model, run)
    moved = predict(model, "vit")
    assert not torch.equal(moved, trained)
    spt.save_delta(model, tmp_path / "task.safetensors")
    assert torch.equal(predict(copy.deepcopy(model), "vit"), moved)
    loaded = spt.load_delta(tiny_vit(), tmp_path / "task.safetensors")
    assert torch.equal(predict(loaded, "vit"), moved)
    spt.unload(model)
    assert torch.equal(predict(model, "vit"), predict(tiny_vit(), "vit"))


def test_an_optimizer_of_before_is_noticed_after_a_cast(conversion: str) -> None:
    if conversion == "overwrite":
        pytest.skip("it holds parameters that are no model's")
    model = tiny_vit()
    run = torch.optim.SGD([p for n, p in model.named_parameters() if "head" not in n], lr=0.1)
    spt.apply(model, make_plan(model, "unstructured"))
    model.double()
    with pytest.raises(RuntimeError, match="the optimizer was made before the plan was applied"):
        step(model, run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_that_is_initialised_before_it_is_moved(dtype: torch.dtype) -> None:
    for change in (None, "swap_module_params", "overwrite_module_params"):
        model = tiny_vit().bfloat16()
        spt.apply(model, make_plan(model, "unstructured"))
        head: Any = model.head
        head.weight.data.fill_(0.5)
        try:
            if change is not None:
                getattr(torch.__future__, f"set_{change}_on_conversion")(True)
            model.to(dtype)
            head.bias.data.fill_(0.25)
        finally:
            if change is not None:
                getattr(torch.__future__, f"set_{change}_on_conversion")(False)
        images, _ = tiny_batch()
        model(images.to(dtype))
        assert bool((head.weight_fp32 == 0.5).all())
        assert bool((head.weight == 0.5).all())
        assert bool((head.bias_fp32 == 0.25).all())
