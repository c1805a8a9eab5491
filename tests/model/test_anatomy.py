"""What each parameter of a model is, and which of them are candidates."""

from __future__ import annotations

import json

import pytest
import torchvision
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from spt_kernels.model import (
    ParameterInfo,
    RowBlock,
    candidate_names,
    describe,
    guess,
    head_names,
    stem_names,
)
from tests.models import tiny_convnext, tiny_swin, tiny_vit


def tiny_beit() -> nn.Module:
    return Beit(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        init_values=0.1,
    )


def tiny_deit() -> nn.Module:
    return VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5
    )


def tiny_mixer() -> nn.Module:
    return MlpMixer(img_size=16, patch_size=4, embed_dim=24, num_blocks=1, num_classes=5)


def tiny_resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, channels=(8, 8, 8, 8))


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=1, num_heads=3, hidden_dim=24, mlp_dim=48
    )


HEAD_AND_STEM = {
    tiny_vit: (["head."], ["patch_embed.proj."]),
    tiny_deit: (["head.", "head_dist."], ["patch_embed.proj."]),
    tiny_beit: (["head."], ["patch_embed.proj."]),
    tiny_swin: (["head.fc."], ["patch_embed.proj.", "patch_embed.norm."]),
    tiny_convnext: (["head.fc."], ["stem.0.", "stem.1."]),
    tiny_mixer: (["head."], ["stem.proj."]),
    tiny_resnet: (["fc."], ["conv1.", "bn1."]),
    torchvision_vit: (["heads.head."], ["conv_proj."]),
    torchvision.models.resnet18: (["fc."], ["conv1.", "bn1."]),
    torchvision.models.convnext_tiny: (["classifier."], ["features.0."]),
}


@pytest.mark.parametrize("make", HEAD_AND_STEM, ids=lambda make: make.__name__)
def test_head_and_stem(make) -> None:
    model = make()
    head, stem = HEAD_AND_STEM[make]
    names = [name for name, _ in model.named_parameters()]
    assert list(head_names(model)) == [n for n in names if n.startswith(tuple(head))]
    assert list(stem_names(model)) == [n for n in names if n.startswith(tuple(stem))]


def test_the_default_candidates_of_a_vit_are_its_blocks_and_final_norm() -> None:
    model = tiny_vit()
    names = [name for name, _ in model.named_parameters()]
    assert candidate_names(model) == [n for n in names if n.startswith(("blocks.", "norm."))]


def test_the_default_candidates_leave_out_tables_and_scales_but_no_bias() -> None:
    for model in (tiny_swin(), tiny_convnext(), tiny_beit()):
        chosen = candidate_names(model)
        assert not [n for n in chosen if n.endswith(("_table", "gamma", "gamma_1", "gamma_2"))]
        left_out = set(dict(model.named_parameters())) - set(chosen)
        in_blocks = [n for n in left_out if describe(model)[n].block]
        assert not [n for n in in_blocks if n.endswith(("weight", "bias"))]


def test_the_final_norm_inside_a_head_module_is_a_candidate() -> None:
    assert {"head.norm.weight", "head.norm.bias"} <= set(candidate_names(tiny_convnext()))


def test_patterns_add_and_take_away() -> None:
    model = tiny_vit()
    default = candidate_names(model)
    names = [name for name, _ in model.named_parameters()]
    assert candidate_names(model, include=["*"]) == names
    assert set(candidate_names(model, include=["pos_embed", "patch_embed.*"])) == {
        *default,
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert candidate_names(model, exclude=["blocks.*", "*.bias"]) == ["norm.weight"]
    assert "norm.weight" not in candidate_names(model, include=["norm.*"], exclude=["norm.*"])


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}.*'block\.\*'"):
        candidate_names(tiny_vit(), **{argument: ["block.*"]})


def test_a_single_string_is_no_list_of_patterns() -> None:
    with pytest.raises(TypeError, match="include"):
        candidate_names(tiny_vit(), include="*")


def test_a_model_without_candidates_is_an_error() -> None:
    with pytest.raises(ValueError, match="no candidate parameters"):
        candidate_names(nn.Sequential(nn.Embedding(3, 4)))


def test_a_fused_qkv_has_three_row_blocks() -> None:
    info = describe(tiny_vit(width=24))
    thirds = (RowBlock("q", 0, 24), RowBlock("k", 24, 48), RowBlock("v", 48, 72))
    for name in ("blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias"):
        assert info[name].row_blocks == thirds
        assert info[name].operation == "qkv"
        assert info[name].block == "blocks.1"
    assert info["blocks.1.attn.qkv.weight"].kind == "linear"
    assert info["blocks.1.attn.qkv.bias"].kind == "bias"


def test_a_fused_kv_has_two_row_blocks() -> None:
    attention = nn.ModuleDict({"kv": nn.Linear(4, 6, bias=False), "q": nn.Linear(4, 3)})
    info = describe(attention)
    assert info["kv.weight"].row_blocks == (RowBlock("k", 0, 3), RowBlock("v", 3, 6))
    assert info["q.weight"].row_blocks == (RowBlock("q", 0, 3),)


@pytest.mark.parametrize(
    ("make", "name", "kind", "operation", "block", "groups"),
    [
        (tiny_vit, "blocks.0.mlp.fc1.weight", "linear", "fc1", "blocks.0", 1),
        (tiny_vit, "blocks.0.norm2.bias", "norm", "norm2", "blocks.0", 1),
        (tiny_vit, "patch_embed.proj.weight", "conv2d", "proj", "", 1),
        (tiny_vit, "cls_token", "other", "cls_token", "", 1),
        (tiny_swin, "layers.1.blocks.0.attn.proj.weight", "linear", "proj", "layers.1.blocks.0", 1),
        (tiny_swin, "layers.1.downsample.reduction.weight", "linear", "reduction", "layers.1", 1),
        (
            tiny_convnext,
            "stages.2.blocks.0.conv_dw.weight",
            "conv2d",
            "conv_dw",
            "stages.2.blocks.0",
            16,
        ),
        (tiny_convnext, "stages.2.blocks.0.gamma", "other", "gamma", "stages.2.blocks.0", 1),
        (tiny_convnext, "stages.1.downsample.0.weight", "norm", "downsample.0", "stages.1", 1),
        (tiny_resnet, "layer2.0.bn1.weight", "norm", "bn1", "layer2.0", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_description(make, name, kind, operation, block, groups) -> None:
    info = describe(make())[name]
    assert (info.kind, info.operation, info.block, info.groups) == (kind, operation, block, groups)
    assert info.shape == tuple(dict(make().named_parameters())[name].shape)
    assert info.row_blocks[0].start == 0
    assert info.row_blocks[-1].stop == info.shape[0]


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin], ids=lambda make: make.__name__)
def test_candidates_are_guessed_as_they_are(make) -> None:
    model = make()
    info = describe(model)
    for name in candidate_names(model):
        assert guess(name, info[name].shape) == info[name]


def test_names_that_say_nothing_are_guessed_by_their_dimensions() -> None:
    assert guess("a", (4, 3)).kind == "linear"
    assert guess("a", (4, 1, 3, 3)) == ParameterInfo(
        "conv2d", (4, 1, 3, 3), (RowBlock("a", 0, 4),), groups=4
    )
    assert guess("a", (4,)).kind == "bias"
    assert guess("a", (1, 4, 3)).kind == "other"


def test_a_shared_parameter_is_described_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(describe(model)) == ["0.weight", "0.bias", "1.bias"]


def test_json_keeps_everything() -> None:
    for info in describe(tiny_convnext()).values():
        assert ParameterInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize("change", [{"kind": "matrix"}, {"shape": 3}, {"rows": [[1]]}])
def test_json_of_something_else_is_an_error(change) -> None:
    value = guess("a.weight", (2, 2)).to_json() | change
    with pytest.raises(ValueError, match="not the description of a parameter"):
        ParameterInfo.from_json(value)


@pytest.mark.parametrize("are_objects", [True, False], ids=["one-object", "one-memory"])
def test_shared_parameters_are_candidates_only_when_asked_for(are_objects: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    shared = model[0].weight
    model[2].weight = shared if are_objects else nn.Parameter(shared.detach())
    assert candidate_names(model) == ["0.bias", "1.weight", "1.bias"]
    assert candidate_names(model, include=["0.weight"])[0] == "0.weight"


def test_the_projection_of_torchs_attention_is_read_and_not_called() -> None:
    info = describe(torchvision_vit())
    prefix = "encoder.layers.encoder_layer_0"
    assert info[f"{prefix}.self_attention.out_proj.weight"].kind == "functional"
    assert info[f"{prefix}.self_attention.out_proj.bias"].kind == "bias"
    assert info[f"{prefix}.mlp.0.weight"].kind == "linear"
