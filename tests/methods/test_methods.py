"""Every method trains, is saved and loaded, and deploys what it trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spt_kernels as spt
from spt_kernels.errors import BaseModelMismatch, DeltaFormatError
from spt_kernels.methods import METHODS, Method, entry_of, make_plan, tune
from spt_kernels.methods.tunable import Tunable
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_convnext, tiny_swin, tiny_vit

from .every import NAMES, method, tuned

# what cannot be folded into the plain model
STAYS = ("mlp-2", "prompt-shallow", "prompt-deep", "noah", "adapter-2", "adaptformer", "spt-prompt")
STAYS += ("spt-adapter-structured", "spt-adapter", "sensitive-adapter-2")
HEAD = 5 * 24 + 5


def types_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    images, target = torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3])
    model.eval()  # no dropout: the loss must fall
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_the_loss_and_deploying_keeps_the_output(name: str) -> None:
    tunable = tuned(name, tiny_vit())
    losses = train(tunable.model, tunable.optimizer(lr=1e-3))
    assert losses[-1] < losses[0]
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        before = tunable.model(images)
        deployed = tunable.deployed()
        torch.testing.assert_close(deployed(images), before, rtol=1e-4, atol=1e-5)
    assert (types_of(deployed) == types_of(tiny_vit())) == (name not in STAYS)
    assert (tunable.fold is None) == (name in STAYS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_is_trained(name: str) -> None:
    tunable = tuned(name, tiny_vit())
    before = {n: p.detach().clone() for n, p in tunable.model.named_parameters()}
    trained = sum(p.numel() for p in tunable.model.parameters() if p.requires_grad)
    train(tunable.model, tunable.optimizer(lr=1e-2, weight_decay=0.0))
    if method(name).entry.home in ("dense_gradient", "published_layer"):
        # most of what requires a gradient there gets none
        after = tunable.model.named_parameters()
        trained = sum(int((p != before[n]).sum()) for n, p in after)
    assert trained == tunable.trained + HEAD
    budget = method(name).budget
    assert budget is None or tunable.trained <= budget


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    tunable = tuned(name, tiny_vit())
    train(tunable.model, tunable.optimizer(lr=1e-2))
    file = tmp_path / "saved.safetensors"
    assert tunable.save(file) == file.stat().st_size
    assert tunable.file_bytes() == file.stat().st_size
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = tunable.model.eval()(images)
        fresh = tuned(name, tiny_vit())
        assert not torch.equal(fresh.model.eval()(images), expected)
        fresh.load(file)
        assert torch.equal(fresh.model.eval()(images), expected)
        if tunable.file == "model":
            again = tiny_vit()
            again.load_state_dict(load_file(file))
            assert torch.equal(again.eval()(images), expected)


def tied_vit() -> nn.Module:
    model = tiny_vit()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    return model


@pytest.mark.parametrize("name", ["full", "lora-2"])
def test_what_is_tied_is_saved_and_comes_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable, fresh = tuned(name, tied_vit()), tuned(name, tied_vit())
    train(tunable.model, tunable.optimizer(lr=1e-2))
    tunable.save(tmp_path / "saved")
    names = load_file(tmp_path / "saved").keys()
    if name == "full":  # as whoever loads it knows it
        assert names == tied_vit().state_dict().keys()
    else:  # what is frozen is of the base, whatever its name
        assert not any(key.endswith("mlp.fc2.weight") for key in names)
        with monkeypatch.context() as before:
            before.setattr(Tunable, "_other_names", lambda self: set())
            tunable.save(tmp_path / "saved")  # as 0.7.2 did
        assert len(load_file(tmp_path / "saved")) == len(names) + 1
    fresh.load(tmp_path / "saved")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fresh.model.eval()(images), tunable.model.eval()(images))


@pytest.mark.parametrize(
    ("saved", "name", "kind"),
    [("prompt-deep", "lora-2", "trained"), ("full", "dense-gradient", "model")],
)
def test_a_file_of_another_method_changes_nothing(
    saved: str, name: str, kind: str, tmp_path: Path
) -> None:
    tuned(saved, tiny_vit() if kind == "trained" else tiny_swin()).save(tmp_path / "prompts")
    other = tuned(name, tiny_vit())
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(ValueError, match="is of a model that is tuned otherwise"):
        other.load(tmp_path / "prompts")
    whole = (tmp_path / "prompts").read_bytes()
    (tmp_path / "prompts").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DeltaFormatError, match=f"cannot load the {kind}"):
        other.load(tmp_path / "prompts")
    assert all(torch.equal(before[name], t) for name, t in other.model.state_dict().items())


def test_trained_values_of_another_base_change_nothing(tmp_path: Path) -> None:
    """One value of one frozen weight is another; or there is a parameter too many or too few."""
    tuned("prompt-deep", tiny_vit()).save(tmp_path / "prompts")
    other, longer, shorter = tiny_vit(), tiny_vit(), tiny_vit()
    with torch.no_grad():
        other.get_parameter("blocks.1.mlp.fc1.weight")[3, 5] += 1.0
    longer.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    shorter.get_submodule("blocks.1.mlp.fc1").bias = None
    for model, problem in (
        (other, r"blocks\.1\.block\.mlp\.fc1\.weight: the weights differ"),
        (longer, "its base has no extra"),
        (shorter, r"the model has no blocks\.1\.block\.mlp\.fc1\.bias"),
    ):
        tunable = tuned("prompt-deep", model)
        before = {name: tensor.clone() for name, tensor in tunable.model.state_dict().items()}
        with pytest.raises(BaseModelMismatch, match=f"made for another base model: {problem}"):
            tunable.load(tmp_path / "prompts")
        after = tunable.model.state_dict()
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_methods_by_name() -> None:
    tunable = spt.methods["lora-3"](tiny_vit())
    assert tunable.trained == 2 * 3 * (24 + 3 * 24)
    model = tiny_vit()
    tunable = spt.methods["spt-lora"](model, skewed_sensitivity(model), budget=500, rank=2)
    assert tunable.plan is not None
    assert tunable.trained == tunable.plan.num_trainable == 500
    assert list(spt.methods) == list(METHODS)
    assert len(spt.methods) == len(METHODS)
    assert "lora-16" in spt.methods
    assert "lora-K" not in spt.methods
    for name in ("lora-K", "lora-0", "lora-", "lora--3", "peft", "full-2", "", 7, None):
        with pytest.raises(
            ValueError, match=r"method: expected one of full, .* \(K is a number\), got"
        ):
            spt.methods[name]

    assert spt.methods["linear"](tiny_vit()).trained == 0


@pytest.mark.parametrize("name", NAMES)
def test_only_a_plain_model_is_tuned(name: str) -> None:
    tunable = tuned(name, tiny_vit())
    for other in ("lora-2", "linear"):
        with pytest.raises(ValueError, match="model: expected a plain one, got one that is tuned"):
            spt.methods[other](tunable.model)
    if tunable.fold is not None:
        spt.methods["lora-2"](tunable.deployed())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        spt.methods["lora-2"]("vit")


def test_every_entry_has_a_file_that_plans_or_tunes() -> None:
    from importlib import import_module

    for entry in METHODS.values():
        home = import_module(f"spt_kernels.methods.{entry.home}")
        assert hasattr(home, "plan") or hasattr(home, "tune")


def test_options_that_a_method_does_not_read_are_refused() -> None:
    for name in NAMES:
        values = {"budget": 2, "rank": 2, "samples": 2, "scale": 2.0, "dropout": 0.0}
        for option, value in {**values, "rule": "published-code"}.items():
            if option not in entry_of(name).options:
                with pytest.raises(ValueError, match=f"{option}: method '{name}' has none"):
                    Method(name, **{option: value})
    for option in values:
        with pytest.raises(TypeError, match=f"{option}: expected a .*number, got 'x'"):
            Method("spt-lora", **{option: "x"})


def test_what_an_older_version_wrote_is_read_without_options_of_no_effect() -> None:
    """`spt-unstructured` once took a rank, and `spt-adapter` LoRA's dropout."""
    old = {**asdict(Method("spt-unstructured", 400)), "rank": 4, "dropout": 0.3}
    assert Method.from_json(old) == Method("spt-unstructured", 400)
    for name in NAMES:
        assert Method.from_json(json.loads(json.dumps(asdict(Method(name))))) == Method(name)
    with pytest.raises(ValueError, match="samples: method 'lora' has none"):
        Method.from_json({"name": "lora", "samples": 3})


def test_what_lies_in_the_memory_of_another_is_not_trained() -> None:
    model = tiny_vit()
    model.head.weight.data = model.pos_embed.data[0, :5]
    for name in ("full", "linear", "prompt-deep"):
        with pytest.raises(
            ValueError, match=r"is shared with .*: two parameters lie in one memory"
        ):
            spt.methods[name](model, **({"budget": 300} if name == "prompt-deep" else {}))


def test_methods_that_choose_need_scores() -> None:
    for name in NAMES:
        if Method(name).is_sensitivity_aware:
            with pytest.raises(ValueError, match=f"sensitivity: method '{name}' needs one"):
                make_plan(tiny_vit(), Method(name))


def test_deep_prompts_are_as_many_as_the_budget_pays_for() -> None:
    tunable = spt.methods["prompt-deep"](tiny_vit(), budget=300)
    assert tunable.trained == 288  # two blocks of six prompts of width 24
    with pytest.raises(ValueError, match="prompts among the tokens of a plain ViT"):
        spt.methods["prompt-deep"](tiny_convnext())
    assert spt.methods["prompt-deep"](tiny_swin(), budget=150).trained == 2 * 2 * (12 + 24)


@pytest.mark.parametrize("name", ["lora", "prompt-deep", "peft-lora-all"])
def test_a_budget_past_the_backbone_is_refused(name: str) -> None:
    method(name)
    with pytest.raises(ValueError, match=r"budget: the backbone has .*, got 10,000,000"):
        spt.methods[name](tiny_vit(), budget=10**7)


@pytest.mark.parametrize("name", ["lora-25", "peft-lora-25"])
def test_a_rank_past_the_smaller_side_is_refused(name: str) -> None:
    method(name)
    with pytest.raises(ValueError, match="method: expected a rank of at most 24, got 25"):
        spt.methods[name](tiny_vit())


@pytest.mark.parametrize(
    "name", ["lora", "lora-2", "peft-lora-2", "peft-lora-all", "peft-super-tuning"]
)
def test_a_model_without_matrices_in_blocks_is_refused_with_a_list(name: str) -> None:
    method(name)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    listed = "; Sequential has, between stem and head: "
    listed += "1 × 3×3 convolution outside blocks, 1 × Linear outside blocks$"
    with pytest.raises(ValueError, match=f"^method: .* in (a )?blocks?{listed}"):
        spt.methods[name](model)


def test_a_budget_below_rank_1_on_every_matrix_is_refused() -> None:
    method("peft-lora-all")
    with pytest.raises(ValueError, match=r"budget: rank 1 on every matrix trains \d+, got 20"):
        spt.methods["peft-lora-all"](tiny_vit(), budget=20)


def test_structured_tuning_alone_leaves_the_entries_out() -> None:
    model = tiny_vit()
    scores = skewed_sensitivity(model)
    both = make_plan(model, Method("spt-lora", 1500, 2), scores)
    alone = make_plan(model, Method("spt-lora-structured", 1500, 2), scores)
    assert both is not None
    assert alone is not None
    assert alone.structured == both.structured
    assert both.num_unstructured > 0 == alone.num_unstructured
    with pytest.raises(ValueError, match="budget: 20 puts no LoRA on any matrix"):
        make_plan(model, Method("spt-lora-structured", 20, 2), scores)


@pytest.mark.parametrize("name", ["spt-prompt", "dense-gradient", "spt-lora"])
def test_a_plan_of_another_model_is_refused_and_changes_nothing(name: str) -> None:
    own, other = tiny_vit(), tiny_vit(width=48)
    what = Method(name, budget=400)
    made = make_plan(own, what, skewed_sensitivity(own))
    before = types_of(other)
    with pytest.raises(BaseModelMismatch, match=r"for another model .*shape \[24\], got \[48\]"):
        tune(other, what, made)
    assert types_of(other) == before
    assert all(p.requires_grad for p in other.parameters())
