"""NOAH's supernet holds every architecture to the bit, and what is counted is what there is."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.methods import Method, noah
from spt_kernels.methods.noah_architecture import NoahArchitecture
from spt_kernels.methods.noah_layers import SharedAdapter, SharedLora
from spt_kernels.methods.tunable import Tunable
from tests.models import tiny_swin, tiny_vit

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
MIXED = NoahArchitecture((5, 1, 0, 0), (0, 10, 2, 0), (1, 0, 7, 0))


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, "depth": 4, "num_classes": 5, **options}).eval()


def supernet_of(model: nn.Module) -> Tunable:
    """One whose weights are all other than zero."""
    tunable = noah.supernet(copy.deepcopy(model), Method("noah", 5000))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tunable.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    tunable.model.eval()
    return tunable


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "init_values": 0.1},
        {"class_token": False, "global_pool": "map", "reg_tokens": 1},
    ],
    ids=["class token", "none", "registers and layer scale", "pooled by attention"],
)
def test_a_part_of_the_supernet_is_the_model_of_its_own_to_the_bit(options: dict[str, Any]) -> None:
    plain = vit(**options)
    whole = supernet_of(plain)
    drawn = [noah.space_of(plain).sample(Random(seed)) for seed in range(3)]
    for architecture in (*drawn, MIXED):
        noah.set_architecture(whole.model, architecture)
        expected = whole.model(images())
        cut = noah.cut(copy.deepcopy(whole), architecture)
        assert torch.equal(cut.model(images()), expected)
        alone = spt.methods["noah"](copy.deepcopy(plain), architecture=architecture)
        state = cut.model.state_dict()
        assert {n: t.shape for n, t in alone.model.state_dict().items()} == {
            n: t.shape for n, t in state.items()
        }
        alone.model.load_state_dict(state)
        assert torch.equal(alone.model(images()), expected)
        assert not torch.equal(plain(images()), expected)


def test_a_part_has_the_gradients_of_the_model_of_its_own_and_the_rest_has_none() -> None:
    whole = supernet_of(vit())
    noah.set_architecture(whole.model, MIXED)
    cut = noah.cut(copy.deepcopy(whole), MIXED)
    for tunable in (whole, cut):
        tunable.model(images()).square().sum().backward()
    own = {n.replace(".block.", "."): p.grad for n, p in cut.model.named_parameters()}
    seen = 0
    for name, parameter in whole.model.named_parameters():
        grad = parameter.grad
        part = own.get(name.replace(".block.", "."))
        if grad is None or part is None:
            assert grad is None, f"{name} is not of this architecture"
            continue
        seen += part.numel()
        assert torch.equal(grad[: len(part)], part), name
        assert not grad[len(part) :].any(), name
    assert seen == cut.trained + cut.in_head


def test_sizes_of_zero_are_the_plain_model() -> None:
    plain = vit()
    whole = supernet_of(plain)
    noah.set_architecture(whole.model, NoahArchitecture((0,) * 4, (0,) * 4, (1, 0, 0, 0)))
    head = {n: p for n, p in whole.model.state_dict().items() if n.startswith("head")}
    plain.load_state_dict(head, strict=False)
    lora: Any = whole.model.blocks[0].block.attn.qkv  # type: ignore[index, union-attr]
    nn.init.zeros_(lora.up)
    torch.testing.assert_close(whole.model(images()), plain(images()))


def test_what_is_counted_is_what_there_is() -> None:
    for seed in range(4):
        plain = vit()
        space = noah.space_of(plain)
        architecture = space.sample(Random(seed))
        tunable = spt.methods["noah"](plain, architecture=architecture)
        of_modules = sum(
            p.numel()
            for name, p in tunable.model.named_parameters()
            if p.requires_grad and not name.startswith("head")
        )
        assert tunable.trained == of_modules == space.count(architecture)


def test_an_adapter_and_a_lora_compute_what_they_say() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    adapter = SharedAdapter(nn.Identity(), 2, 6, 0.0, nn.Identity())
    nn.init.normal_(adapter.down_bias)
    nn.init.normal_(adapter.up_bias)
    low = x @ adapter.down.t() + adapter.down_bias
    low = low / (1 + torch.exp(-1.702 * low))
    torch.testing.assert_close(adapter(x), x + low @ adapter.up + adapter.up_bias)
    base = nn.Linear(6, 4)
    lora = SharedLora(base, 2, 0.0)
    assert torch.equal(lora(x), base(x)), "it starts as nothing"
    nn.init.normal_(lora.up)
    expected = nn.functional.linear(x, base.weight + lora.up.t() @ lora.down, base.bias)
    torch.testing.assert_close(lora(x), expected)
    lora.dropout = 0.5
    assert not torch.equal(lora(x), lora.eval()(x)), "dropout is for training"


def test_without_an_architecture_the_largest_uniform_one_within_the_budget_is_trained() -> None:
    tunable = spt.methods["noah"](tiny_vit(), budget=1500)  # two blocks of width 24
    assert tunable.tuned_as["architecture"] == NoahArchitecture.uniform(4, 2).to_json()
    assert tunable.trained == 2 * (4 * 24 + (2 * 4 * 24 + 4 + 24) + 4 * (24 + 72)) == 1400
    with pytest.raises(ValueError, match=r"budget: a prompt, .* train 386, got 385"):
        spt.methods["noah"](tiny_vit(), budget=385)


def test_the_limit_is_the_published_one_of_vit_base() -> None:
    with torch.device("meta"):
        model = VisionTransformer(num_classes=5)
    assert noah.limit_of(model, Method("noah")) == 640_000
    assert noah.limit_of(model, Method("noah", 0.01)) == 857_986
    space = noah.space_of(model)
    assert space.count(space.largest) == 654_456  # 12 · (7,680 + 16,138 + 30,720)
    uniform = spt.methods["noah"](model)  # of size 9: 12 · (6,912 + 14,601 + 27,648)
    assert uniform.trained == 589_932


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tiny_swin, "plain ViT: .* got SwinTransformer"),
        (lambda: Beit(**SIZES), "q_bias; got Beit|relative_position_index; got Beit"),
        (lambda: Eva(**SIZES, use_rot_pos_emb=True), "no rope; got Eva"),
        (lambda: VisionTransformerRelPos(**SIZES), "got VisionTransformerRelPos"),
    ],
    ids=["swin", "beit", "eva", "relpos"],
)
def test_what_is_no_plain_vit_is_refused(make: Any, words: str) -> None:
    model = make()
    before = [p.requires_grad for p in model.parameters()]
    for attempt in (
        lambda: spt.methods["noah"](model),
        lambda: noah.supernet(model, Method("noah")),
    ):
        with pytest.raises(ValueError, match=f"method: NOAH needs a {words}|{words}"):
            attempt()
    assert [p.requires_grad for p in model.parameters()] == before


def test_an_architecture_of_another_model_is_refused_and_changes_nothing() -> None:
    with pytest.raises(ValueError, match="architecture: the model has 2 blocks, got 4"):
        spt.methods["noah"](tiny_vit(), architecture=MIXED)
    with pytest.raises(ValueError, match="budget: the architecture trains 1,400, got 1,399"):
        spt.methods["noah"](tiny_vit(), architecture=NoahArchitecture.uniform(4, 2), budget=1399)
    whole = supernet_of(vit())
    noah.set_architecture(whole.model, MIXED)
    expected = whole.model(images())
    for wrong, words in (
        (NoahArchitecture.uniform(11, 4), "expected a size of at most 10, got 11"),
        (NoahArchitecture.uniform(1, 3), "the model has 4 blocks, got 3"),
    ):
        with pytest.raises(ValueError, match=f"architecture: {words}"):
            noah.set_architecture(whole.model, wrong)
    cut = noah.cut(copy.deepcopy(whole), MIXED)
    with pytest.raises(ValueError, match="expected none where the model has none, got 1"):
        noah.set_architecture(cut.model, NoahArchitecture.uniform(1, 4))
    for model in (whole.model, cut.model):
        assert torch.equal(model(images()), expected)
    with pytest.raises(ValueError, match="got one that is tuned already"):
        spt.methods["lora-2"](whole.model)
    with pytest.raises(ValueError, match="budget: the smallest architecture of NOAH's trains 193"):
        noah.supernet(tiny_vit(), Method("noah", 192))


def test_lora_alone_folds_into_the_plain_model() -> None:
    alone = NoahArchitecture((0, 0), (0, 0), (3, 1))
    tunable = spt.methods["noah"](tiny_vit(), architecture=alone)
    for module in tunable.model.modules():
        if isinstance(module, SharedLora):
            nn.init.normal_(module.up)
    expected = tunable.model.eval()(images())
    deployed = tunable.deployed()
    torch.testing.assert_close(deployed(images()), expected)
    assert [type(m) for m in deployed.modules()] == [type(m) for m in tiny_vit().modules()]


def test_a_file_tells_its_architecture_and_is_refused_by_another(tmp_path: Path) -> None:
    one, other = NoahArchitecture((2, 1), (1, 0), (0, 3)), NoahArchitecture((2, 1), (1, 0), (0, 2))
    file = tmp_path / "trained.safetensors"
    spt.methods["noah"](tiny_vit(), architecture=one).save(file)
    assert noah.architecture_in(file) == one
    spt.methods["noah"](tiny_vit(), architecture=noah.architecture_in(file)).load(file)
    for wrong in (other, NoahArchitecture.uniform(1, 2)):
        tunable = spt.methods["noah"](tiny_vit(), architecture=wrong)
        before = copy.deepcopy(tunable.model.state_dict())
        with pytest.raises(
            ValueError, match=r"tuned otherwise: its architecture is .*\[0, 3\].*here"
        ):
            tunable.load(file)
        after = tunable.model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    spt.methods["prompt-deep"](tiny_vit()).save(file)
    with pytest.raises(ValueError, match="architecture: expected prompts, adapters, loras"):
        noah.architecture_in(file)
