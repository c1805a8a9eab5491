"""PEFT's own sparse adapters compute the same here, and are tasks from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import spt_kernels as spt
from spt_kernels.peft import SptConfig, import_adapter
from tests.models import tiny_vit

from .small import output, plan, train

LAYERS = ["qkv", "mlp.fc1"]
WEIGHTS = "adapter_model.safetensors"


def saved(config: Any, folder: Path) -> torch.Tensor:
    """Train PEFT's own adapter and save it; returns its output."""
    model = train(get_peft_model(tiny_vit(), config))
    model.save_pretrained(folder)
    return output(model)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ShiraConfig(r=2, target_modules=LAYERS, modules_to_save=["head"]), 2 * 2 * 216),
        (ShiraConfig(r=1, target_modules=LAYERS), 2 * 216),
        (SupertuningConfig(sparsity=0.9, target_modules=LAYERS, modules_to_save=["head"]), 804),
        (SupertuningConfig(sparsity=0.9, target_modules=LAYERS, select_top=False), 804),
        (
            SupertuningConfig(
                sparsity=0.9,
                target_modules=LAYERS,
                select_top=False,
                save_precomputed_indices=False,
            ),
            804,
        ),
    ],
    ids=["shira with head", "shira", "super with head", "super bottom", "super without indices"],
)
def test_it_computes_what_peft_does(config: Any, count: int, tmp_path: Path) -> None:
    expected = saved(config, tmp_path)
    model = import_adapter(tiny_vit(), tmp_path)
    assert model.spt_tuning.plan.num_trainable == count
    assert bool(model.spt_tuning.plan.head) is bool(config.modules_to_save)
    torch.testing.assert_close(output(model), expected)
    spt.save_delta(model, tmp_path / "task")
    torch.testing.assert_close(output(spt.load_delta(tiny_vit(), tmp_path / "task")), expected)
    torch.testing.assert_close(output(spt.merge(model)), expected)


def test_it_trains_on_in_peft(tmp_path: Path) -> None:
    saved(ShiraConfig(r=2, target_modules=LAYERS, modules_to_save=["head"]), tmp_path / "shira")
    model = get_peft_model(import_adapter(tiny_vit(), tmp_path / "shira"), SptConfig())
    train(model).save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "ours")
    assert torch.equal(output(loaded), output(model))


def test_indices_that_windows_saved_as_numbers(tmp_path: Path) -> None:
    expected = saved(ShiraConfig(r=2, target_modules=LAYERS), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    floats = {n: t.float() if n.endswith("indices") else t for n, t in tensors.items()}
    save_file(floats, tmp_path / WEIGHTS)
    torch.testing.assert_close(output(import_adapter(tiny_vit(), tmp_path)), expected)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=LAYERS), "expected an adapter of SHIRA or SUPERTUNING, got .*L"),
        (SupertuningConfig(r=2, target_modules=LAYERS), "a LoRA on the matrices"),
    ],
)
def test_other_kinds_are_refused(config: Any, match: str, tmp_path: Path) -> None:
    get_peft_model(tiny_vit(), config).save_pretrained(tmp_path)
    base = tiny_vit()
    with pytest.raises(ValueError, match=match):
        import_adapter(base, tmp_path)
    assert not hasattr(base, "spt_tuning")


def tied() -> Any:
    model = tiny_vit()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    return model


def test_what_is_tied_and_was_trained_apart_is_refused(tmp_path: Path) -> None:
    config = ShiraConfig(r=2, target_modules=LAYERS, modules_to_save=["blocks.0.mlp.fc2"])
    train(get_peft_model(tied(), config)).save_pretrained(tmp_path)
    base = tied()
    with pytest.raises(ValueError, match=r"0\.mlp\.fc2\.weight apart from blocks\.1\.mlp\.fc2\.we"):
        import_adapter(base, tmp_path)
    assert torch.equal(output(base), output(tied()))
    # what comes under both names, and is the same, is tied there as well
    tensors = load_file(tmp_path / WEIGHTS)
    weight = tensors["base_model.model.blocks.0.mlp.fc2.weight"]
    tensors["base_model.model.blocks.1.mlp.fc2.weight"] = weight.clone()
    save_file(tensors, tmp_path / WEIGHTS)
    import_adapter(base, tmp_path)
    assert base.blocks[0].mlp.fc2.weight is base.blocks[1].mlp.fc2.weight
    assert torch.equal(base.blocks[0].mlp.fc2.weight, weight)


def test_base_weights_that_come_along_must_be_the_model_s(tmp_path: Path) -> None:
    expected = saved(ShiraConfig(r=2, target_modules=LAYERS), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    weight = tiny_vit().blocks[0].mlp.fc1.weight.detach()
    name = "base_model.model.blocks.0.mlp.fc1.base_layer.weight"
    save_file({**tensors, name: weight}, tmp_path / WEIGHTS)
    torch.testing.assert_close(output(import_adapter(tiny_vit(), tmp_path)), expected)
    save_file({**tensors, name: weight + 1}, tmp_path / WEIGHTS)
    with pytest.raises(
        spt.BaseModelMismatch, match=r"fc1\.weight has other values than those the a"
    ):
        import_adapter(tiny_vit(), tmp_path)


@pytest.mark.parametrize("kind", [ShiraConfig, SupertuningConfig])
def test_what_does_not_fit_is_refused(kind: Any, tmp_path: Path) -> None:
    saved(kind(target_modules=LAYERS, **({"r": 2} if kind is ShiraConfig else {})), tmp_path)
    with pytest.raises(spt.BaseModelMismatch, match=r"no matrix blocks\.1"):
        import_adapter(tiny_vit(depth=1), tmp_path)
    with pytest.raises(ValueError, match="tuned: unload it first"):
        import_adapter(spt.apply(tiny_vit(), plan()), tmp_path)


@pytest.mark.parametrize(
    "match", ["weight'. must lie in", "columns must lie in", "positions", "lacks"]
)
def test_damaged_ones_are_refused(match: str, tmp_path: Path) -> None:
    saved(ShiraConfig(r=2, target_modules=LAYERS), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("qkv.shira_indices"))
    if match == "lacks":
        del tensors[name]
    elif match == "positions":
        tensors[name] = tensors[name][:, 1:].contiguous()
    else:
        tensors[name][int(match.startswith("columns")), -1] = 10_000
    save_file(tensors, tmp_path / WEIGHTS)
    base = tiny_vit()
    with pytest.raises(spt.DeltaFormatError, match=match):
        import_adapter(base, tmp_path)
    assert not hasattr(base, "spt_tuning")
