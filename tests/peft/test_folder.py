"""The folder that PEFT saves and loads: round trips, and what must not be loaded."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import spt_kernels as spt
from spt_kernels.peft import SptConfig
from spt_kernels.peft.config import PLAN_FILE
from spt_kernels.peft.weights import ABOUT
from tests.models import tiny_vit
from tests.task.test_tied import WORDS, Speaker

from .small import output, plan, train

WEIGHTS = "adapter_model.safetensors"


def saved(folder: Path, structured: str | None = "lora", **options: Any) -> torch.Tensor:
    """Train and save; returns the output."""
    config = SptConfig(plan=plan(structured=structured), **options)
    model = train(get_peft_model(tiny_vit(), config))
    model.save_pretrained(folder)
    return output(model)


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    config = SptConfig(plan=plan(), modules_to_save=["patch_embed"], base_model_name_or_path="vit")
    config.save_pretrained(tmp_path)
    found = SptConfig.from_pretrained(tmp_path)
    assert found == config
    assert found.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SPT"
    assert isinstance(PeftConfig.from_pretrained(tmp_path), SptConfig)
    assert SptConfig(plan=tmp_path / PLAN_FILE).plan == plan()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"plan": 3}, TypeError, "plan must be a Plan or the path of one, got int"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list"),
        ({"modules_to_save": [3]}, TypeError, "modules_to_save must be a list"),
        ({"task_type": "SEQ_CLS"}, ValueError, "task_type: .* SEQ_CLS"),
        ({"task_type": "NONSENSE"}, ValueError, "NONSENSE"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        SptConfig(**{"plan": plan(), **options})


@pytest.mark.parametrize("structured", ["lora", "adapter", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_adapter_computes_the_same(
    structured: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = SptConfig(plan=plan(structured=structured), modules_to_save=["patch_embed.proj"])
    model = train(get_peft_model(tiny_vit().to(dtype), config))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit().to(dtype), tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    again = PeftModel.from_pretrained(tiny_vit().to(dtype), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_the_layout_is_that_of_the_hub(tmp_path: Path) -> None:
    saved(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "adapter_config.json", WEIGHTS, PLAN_FILE}
    tensors = load_file(tmp_path / WEIGHTS)
    numel = sum(t.numel() for key, t in tensors.items() if ".spt_" in key and key != ABOUT)
    assert numel == plan().num_trainable
    head = {key for key in tensors if ".spt_" not in key}
    assert head == {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert spt.Plan.load(tmp_path / PLAN_FILE).num_trainable == plan().num_trainable


def test_weights_in_torch_s_format(tmp_path: Path) -> None:
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan())))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(output(PeftModel.from_pretrained(tiny_vit(), tmp_path)), output(model))


def test_several_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan())))
    first = output(model)
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    model.set_adapter("other")
    second = output(train(model))
    model.set_adapter("default")
    with model.disable_adapter():  # what is saved does not hang on what is on the model
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    assert torch.equal(output(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(output(loaded), second)
    assert torch.equal(
        output(PeftModel.from_pretrained(tiny_vit(), tmp_path, subfolder="other")), second
    )


def test_loading_into_an_adapter_keeps_its_parameters(tmp_path: Path) -> None:
    tuned = saved(tmp_path)
    model = get_peft_model(tiny_vit(), SptConfig(plan=plan()))
    before = {name: id(p) for name, p in model.named_parameters()}
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output(model), tuned)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert any(p.requires_grad for p in model.parameters())


def test_the_task_file_is_that_of_the_model_without_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan())))
    torch.manual_seed(0)
    bare = train(spt.apply(tiny_vit(), plan()))
    files = [tmp_path / name for name in ("peft", "base", "bare")]
    for each, file in zip((model, model.get_base_model(), bare), files, strict=True):
        spt.save_delta(each, file)
    assert len({file.read_bytes() for file in files}) == 1
    taken_over = get_peft_model(spt.load_delta(tiny_vit(), files[0]), SptConfig())
    assert torch.equal(output(taken_over), output(model))
    with pytest.raises(ValueError, match="load_adapter"):
        spt.load_delta(model, files[0])


def test_another_base_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    tuned = saved(tmp_path)
    other = tiny_vit(seed=1)
    with pytest.raises(spt.BaseModelMismatch, match="made for another base model: blocks"):
        PeftModel.from_pretrained(other, tmp_path, is_trainable=True)
    assert torch.equal(output(other), output(tiny_vit(seed=1)))
    assert not hasattr(other, "spt_tuning")
    assert all(p.requires_grad for p in other.parameters())
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert torch.equal(output(model), tuned)


def damaged(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    delta = next(key for key in tensors if key.endswith(".spt_delta"))
    if kind == "lack the tensor":
        del tensors[delta]
    elif kind == "NaN":
        tensors[delta][0] = torch.nan
    elif kind == "expected shape":
        tensors[delta] = tensors[delta][:-1]
    elif kind == "spt_task is damaged":
        tensors[ABOUT] = tensors[ABOUT][:-1]
    elif kind == "not of SPT":
        del tensors[ABOUT]
    elif kind == "newer than":
        about = json.loads(bytes(tensors[ABOUT].numpy()))
        text = json.dumps({**about, "format": 99}).encode()
        tensors[ABOUT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    "kind",
    [
        *("lack the tensor", "NaN", "expected shape", "spt_task is damaged", "not of SPT"),
        "newer than",
    ],
)
def test_damaged_weights_are_refused(kind: str, tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damaged(kind, tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    base = tiny_vit()
    with pytest.raises(spt.DeltaFormatError, match=kind):
        PeftModel.from_pretrained(base, tmp_path)
    assert not hasattr(base, "spt_tuning")
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan())))
    tuned = output(model)
    for name in ("default", "new"):
        with pytest.raises(spt.DeltaFormatError, match=kind):
            model.load_adapter(tmp_path, name)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), tuned)


def test_weights_of_another_plan_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = get_peft_model(tiny_vit(), SptConfig(plan=plan(1100)))
    with pytest.raises(ValueError, match="by another plan than it has"):
        model.load_adapter(tmp_path, "default")


def test_a_folder_without_its_plan_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / PLAN_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=PLAN_FILE):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)


def test_the_state_dict_of_an_adapter(tmp_path: Path) -> None:
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan()), adapter_name="head"))
    keys = get_peft_model_state_dict(model, adapter_name="head").keys()
    assert "base_model.model.head.weight" in keys  # which is no name of an adapter there
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "head" / WEIGHTS).keys() == keys


def test_a_state_dict_that_is_not_the_models_is_no_adapter(tmp_path: Path) -> None:
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan())))
    best, said = {name: t.clone() for name, t in model.state_dict().items()}, output(model)
    train(model)
    with pytest.raises(ValueError, match="state_dict: expected the model's own, got other values"):
        model.save_pretrained(tmp_path, state_dict=best)
    model.load_state_dict(best)
    model.save_pretrained(tmp_path, state_dict=best)
    assert torch.equal(output(PeftModel.from_pretrained(tiny_vit(), tmp_path)), said)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = saved(tmp_path / "someone" / "flowers")
    asked = []

    @functools.wraps(hf_hub_download)  # of which PEFT reads the names of the options
    def download(repo: str, filename: str, subfolder: Any = None, **options: Any) -> str:
        asked.append((repo, options.get("revision")))
        copy = tmp_path / "cache" / filename
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((tmp_path / repo / (subfolder or "") / filename).read_bytes())
        return str(copy)

    for module in ("peft.config", "peft.utils.save_and_load", "spt_kernels.peft.config"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda **_: True)
    loaded = PeftModel.from_pretrained(tiny_vit(), "someone/flowers", revision="v1")
    assert torch.equal(output(loaded), tuned)
    assert set(asked) == {("someone/flowers", "v1")}
    assert (tmp_path / "cache" / PLAN_FILE).exists()


def test_onto_a_model_with_another_head(tmp_path: Path) -> None:
    tuned = saved(tmp_path)
    base = tiny_vit(num_classes=3)
    for name, parameter in tiny_vit().named_parameters():
        if not name.startswith("head."):
            base.get_parameter(name).data.copy_(parameter)
    before = output(base)
    model = PeftModel.from_pretrained(base, tmp_path, adapter_name="flowers")
    assert torch.equal(output(model), tuned)
    with model.disable_adapter():
        assert torch.equal(output(model), before)
    assert torch.equal(output(model), tuned)
    assert torch.equal(output(model.unload()), before)


def test_cast_after_training_it_fits_both_bases(tmp_path: Path) -> None:
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=plan())))
    tuned = output(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    half = PeftModel.from_pretrained(tiny_vit().to(torch.bfloat16), tmp_path)
    assert torch.equal(output(half), output(model))
    whole = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    torch.testing.assert_close(output(whole), tuned, atol=2e-3, rtol=0)  # the head was rounded
    with pytest.raises(spt.BaseModelMismatch, match="expected float32 weights, got float64"):
        PeftModel.from_pretrained(tiny_vit().double(), tmp_path)


def test_what_is_tied_is_loaded_where_it_is_tied_alone(tmp_path: Path) -> None:
    plan = spt.Plan({}, {}, {}, head=("words.weight",), model_name="speaker")
    model = get_peft_model(Speaker(is_tied=True), SptConfig(plan=plan))
    with torch.no_grad():
        model.base_model.model.words.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Speaker(is_tied=True), tmp_path)
    assert torch.equal(loaded(WORDS), model(WORDS))
    with pytest.raises(spt.BaseModelMismatch, match=r"say\.weight: expected the same parameter as"):
        PeftModel.from_pretrained(Speaker(is_tied=False), tmp_path)


def test_folders_of_before_tell_of_no_ties_and_no_classes(tmp_path: Path) -> None:
    before = saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    about = json.loads(bytes(tensors[ABOUT].numpy()))
    del about["tied"], about["classes"]
    text = json.dumps(about).encode()
    tensors[ABOUT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, tmp_path / WEIGHTS)
    assert torch.equal(output(PeftModel.from_pretrained(tiny_vit(), tmp_path)), before)
