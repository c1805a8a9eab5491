"""Tasks over a quantized base: trained, saved, loaded, swapped, unloaded, and made floats of."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.sensitivity import skewed_sensitivity
from spt_kernels.task.set_aside import put_task_back, take_aside
from tests.models import tiny_batch, tiny_vit
from tests.quantized import RowScaled, as_floats, quantize

IMAGES, LABELS = tiny_batch(6)
STRUCTURED = ("lora", "adapter", None)


def plan_of(model: nn.Module, structured: str | None = "lora", budget: int = 1500) -> spt.Plan:
    dropout = {"dropout": 0.0} if structured == "lora" else {}
    return spt.allocate(skewed_sensitivity(model), budget, structured, rank=2, **dropout)  # type: ignore[arg-type]


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def tuned(structured: str | None = "lora", seed: int = 0) -> nn.Module:
    model = quantize(tiny_vit())
    plan = plan_of(model, structured)
    torch.manual_seed(seed)
    spt.apply(model, plan)
    train(model)
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(IMAGES)


@pytest.mark.parametrize("structured", STRUCTURED)
def test_it_trains_as_the_float_model_of_the_same_values(structured: str | None) -> None:
    models = quantize(tiny_vit()), as_floats(quantize(tiny_vit()))
    plan = plan_of(models[0], structured)
    found = []
    for model in models:
        torch.manual_seed(0)
        spt.apply(model, plan)
        found.append(train(model, 5))
    assert found[0][-1] < found[0][0]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    torch.testing.assert_close(outputs(models[0]), outputs(models[1]), rtol=1e-3, atol=1e-4)


def test_matrices_that_the_plan_leaves_alone_keep_no_float_copy() -> None:
    model = quantize(tiny_vit())
    plan = spt.allocate(skewed_sensitivity(model), 20, None)
    spt.apply(model, plan)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith(("fc1", "qkv"))}
    assert kinds == {"QuantizedDeltaLinear"}
    spt.unload(model)
    assert not any("Quantized" in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize("structured", STRUCTURED)
def test_saved_and_loaded(structured: str | None, tmp_path: Path) -> None:
    model = tuned(structured)
    path = tmp_path / "task.safetensors"
    spt.save_delta(model, path)
    fresh = quantize(tiny_vit())
    before = outputs(fresh)
    spt.load_delta(fresh, path)
    assert torch.equal(outputs(fresh), outputs(model))
    again = tmp_path / "again.safetensors"
    spt.save_delta(fresh, again)
    assert again.read_bytes() == path.read_bytes()
    spt.unload(fresh)
    assert torch.equal(outputs(fresh), before)
    assert type(fresh.blocks[0].mlp.fc1) is nn.Linear


def test_tasks_are_swapped(tmp_path: Path) -> None:
    paths, expected = [], []
    for structured in STRUCTURED:
        model = tuned(structured)
        paths.append(tmp_path / f"{structured}.safetensors")
        spt.save_delta(model, paths[-1])
        expected.append(outputs(model))
    model = quantize(tiny_vit())
    for n in (0, 1, 2, 0, 2):
        spt.load_delta(model, paths[n])
        assert torch.equal(outputs(model), expected[n])


def test_a_task_is_swapped_in_place(tmp_path: Path) -> None:
    model, other = tuned("lora"), tuned("lora", seed=1)
    spt.save_delta(other, tmp_path / "other.safetensors")
    parameters = [p for p in model.parameters() if p.requires_grad]
    spt.load_delta(model, tmp_path / "other.safetensors")
    assert all(a is b for a, b in zip(parameters, filter(_trains, model.parameters()), strict=True))
    assert torch.equal(outputs(model), outputs(other))


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad


def other_levels(model: Any) -> Any:
    model.blocks[0].mlp.fc1.weight.levels[0, 0] += 1
    return model


def other_scale(model: Any) -> Any:
    model.blocks[0].mlp.fc1.weight.scale[3] *= 1.01
    return model


@pytest.mark.parametrize(
    ("base", "difference"),
    [
        (lambda: as_floats(quantize(tiny_vit())), "quantized to RowScaled, got weights in float32"),
        (lambda: other_levels(quantize(tiny_vit())), r"fc1.weight: the weights differ"),
        (lambda: other_scale(quantize(tiny_vit())), r"fc1.weight: the weights differ"),
    ],
    ids=["floats", "levels", "scale"],
)
def test_another_base_is_refused_and_may_be_taken_on_purpose(
    base: Any, difference: str, tmp_path: Path
) -> None:
    model, path = tuned("lora"), tmp_path / "task.safetensors"
    spt.save_delta(model, path)
    other = base()
    before = outputs(other)
    with pytest.raises(spt.BaseModelMismatch, match=difference):
        spt.load_delta(other, path)
    assert torch.equal(outputs(other), before)
    spt.load_delta(other, path, check_base=False)
    torch.testing.assert_close(outputs(other), outputs(model), rtol=0.3, atol=0.1)
    # from here on it is a task of this base
    spt.save_delta(other, path)
    spt.load_delta(base(), path)


def test_without_the_check_shapes_are_checked_all_the_same(tmp_path: Path) -> None:
    spt.save_delta(tuned("lora"), tmp_path / "task.safetensors")
    with pytest.raises(spt.BaseModelMismatch, match="expected shape"):
        spt.load_delta(tiny_vit(width=48), tmp_path / "task.safetensors", check_base=False)


def test_a_float_task_is_refused_on_a_quantized_base(tmp_path: Path) -> None:
    model = tiny_vit()
    spt.apply(model, plan_of(model))
    spt.save_delta(model, tmp_path / "task.safetensors")
    with pytest.raises(
        spt.BaseModelMismatch,
        match=r"weights in float32, got weights quantized to RowScaled: .*check_base=False",
    ):
        spt.load_delta(quantize(tiny_vit()), tmp_path / "task.safetensors")


@pytest.mark.parametrize("structured", STRUCTURED)
def test_made_floats_of_it_gives_what_it_gave_and_merges(structured: str | None) -> None:
    model = tuned(structured)
    expected = outputs(model)
    if structured != "adapter":
        with pytest.raises(ValueError, match=r"quantized to RowScaled.*spt\.dequantize\(model\)"):
            spt.merge(model)
    assert torch.equal(outputs(model), expected)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    spt.dequantize(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(isinstance(p.data, RowScaled) for p in model.parameters())
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    if structured != "adapter":
        spt.merge(model)
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    assert type(model.blocks[0].mlp.fc2) is nn.Linear or structured == "adapter"


def test_a_plain_model_is_made_floats_of() -> None:
    model = quantize(tiny_vit())
    expected = outputs(model)
    assert spt.dequantize(model, torch.float64) is model
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float64
    torch.testing.assert_close(outputs(spt.dequantize(quantize(tiny_vit()))), expected)


def test_what_cannot_be_made_floats_of() -> None:
    with pytest.raises(ValueError, match="VisionTransformer has no quantized parameter"):
        spt.dequantize(tiny_vit())
    with pytest.raises(TypeError, match=r"dtype must be a floating dtype or None, got torch\.int8"):
        spt.dequantize(quantize(tiny_vit()), torch.int8)
    model = tiny_vit()
    spt.apply(model, plan_of(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="has no quantized parameter"):
        spt.dequantize(model)
    assert all(
        p is own for p, own in zip(trained, filter(_trains, model.parameters()), strict=True)
    )


def test_only_biases_and_norms_are_merged() -> None:
    model = quantize(tiny_vit())
    scores = skewed_sensitivity(model)
    small = {n: s if s.dim() == 1 else torch.zeros_like(s) for n, s in scores.items()}
    made = spt.Sensitivity.from_tensors(small, num_samples=1, info=scores.info, head=scores.head)
    spt.apply(model, spt.allocate(made, 60, None))
    train(model)
    expected = outputs(model)
    spt.merge(model)
    assert type(model.blocks[0].mlp.fc1) is nn.Linear
    torch.testing.assert_close(outputs(model), expected)


def test_copies_pickles_and_state_dicts(tmp_path: Path) -> None:
    model = tuned("lora")
    expected = outputs(model)
    other = tuned("lora", seed=1)
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(outputs(twin), expected)
        spt.save_delta(twin, tmp_path / "twin.safetensors")
        spt.load_delta(quantize(tiny_vit()), tmp_path / "twin.safetensors")


def test_a_tuned_model_is_moved(tmp_path: Path) -> None:
    model = tuned()
    before = outputs(model)
    moved = copy.deepcopy(model).to("cpu")  # where to does not matter: torch swaps its parameters
    assert torch.equal(outputs(moved), before)
    train(moved, 1)
    assert not torch.equal(outputs(moved), before)
    spt.save_delta(moved, tmp_path / "task.safetensors")
    served = spt.load_delta(quantize(tiny_vit()), tmp_path / "task.safetensors")
    assert torch.equal(outputs(served), outputs(moved))


def test_a_state_dict_of_another_base_brings_that_base(tmp_path: Path) -> None:
    model, other = tuned("lora"), other_levels(tuned("lora"))
    model.load_state_dict(other.state_dict())
    spt.save_delta(model, tmp_path / "task.safetensors")
    spt.load_delta(other_levels(quantize(tiny_vit())), tmp_path / "task.safetensors")


def test_a_weight_that_changed_is_noticed(tmp_path: Path) -> None:
    model = other_levels(tuned("lora"))
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.weight is frozen, and yet no longer"):
        spt.save_delta(model, tmp_path / "task.safetensors")


def test_taken_aside_and_put_back() -> None:
    model = tuned("lora")
    expected, base = outputs(model), outputs(quantize(tiny_vit()))
    aside = take_aside(model)
    assert torch.equal(outputs(model), base)
    put_task_back(model, aside)
    assert torch.equal(outputs(model), expected)
    assert train(model)


def test_a_quantized_head_is_refused() -> None:
    model = quantize(tiny_vit(), but=lambda name: False)
    plan = plan_of(tiny_vit())
    message = r"head.weight of the head is quantized to RowScaled, and a head is trained whole"
    with pytest.raises(ValueError, match=message):
        spt.apply(model, plan)
    with pytest.raises(ValueError, match=message):
        spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False)
    assert not hasattr(model, "spt_tuning")


def test_a_bank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn.qkv.weight is quantized to RowScaled, and a bank"):
        spt.TaskBank(quantize(tiny_vit()))
