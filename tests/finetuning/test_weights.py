"""Weights of a file into a model: every form that people have, fitted by the model's own names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from spt_kernels.finetuning.base.models import BaseModel, ModelSource, build

from .pictures_on_disk import TINY, write_weights

NAME = "vit_tiny_patch16_224"
State = dict[str, Tensor]


@pytest.fixture
def state(tmp_path: Path) -> State:
    write_weights(tmp_path / "own.safetensors", num_classes=5)
    return load_file(tmp_path / "own.safetensors")


def built(tmp_path: Path, content: object, num_classes: int = 5, **args: object) -> BaseModel:
    """The tiny ViT with the weights that `torch.save` writes of `content`."""
    torch.save(content, tmp_path / "w.pth")
    source = ModelSource(NAME, {**TINY, **args}, str(tmp_path / "w.pth"))
    return build(source, num_classes)


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def moved(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


def assert_holds(model: torch.nn.Module, state: State) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


WRAPPINGS: dict[str, Callable[[State], object]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "timm's training": lambda s: {
        "state_dict": moved(s),
        "state_dict_ema": s,
        "args": argparse.Namespace(lr=0.1),
    },
    "model_ema": lambda s: {"model": moved(s), "model_ema": s},
    "only an average": lambda s: {"ema": {"module": s}},
    "DDP": lambda s: under("module.", s),
    "torch.compile": lambda s: under("_orig_mod.", s),
    "compiled DDP": lambda s: under("_orig_mod.module.", s),
    "averaged": lambda s: {**under("module.", s), "n_averaged": torch.tensor(3)},
    "Lightning": lambda s: {"state_dict": under("model.", s), "callbacks": {}},
    "a backbone": lambda s: {**under("backbone.", s), "neck.weight": torch.ones(3, 3)},
    "any prefix": lambda s: under("trainer.net_7.", s),
    "MoCo": lambda s: {
        "state_dict": {
            **under("module.base_encoder.", s),
            **under("module.momentum_encoder.", moved(s)),
            "module.predictor.0.weight": torch.ones(3, 3),
        }
    },
    "DINO": lambda s: {
        "student": under("module.backbone.", moved(s)),
        "teacher": under("backbone.", s),
    },
    "half precision": lambda s: {n: t.double() for n, t in s.items()},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_weights_are_found_in_any_wrapping(
    tmp_path: Path, state: State, wrap: Callable[[State], object]
) -> None:
    base = built(tmp_path, wrap(state))
    assert not base.head_is_new
    assert_holds(base.model, state)


def test_what_was_taken_and_left_out_is_told(tmp_path: Path, state: State) -> None:
    body = {n: t for n, t in state.items() if not n.startswith("head.")}
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        **{f"decoder_blocks.{i}.norm1.weight": torch.ones(8) for i in range(3)},
    }
    base = built(tmp_path, {"model": {**body, **decoder}}, num_classes=4)  # as MAE writes it
    assert base.head_is_new
    assert_holds(
        base.model, {**state, **{f"head.{n}": p for n, p in base.model.head.named_parameters()}}
    )
    notes = "; ".join(base.weight_notes)
    assert "taken from 'model'" in notes
    assert "left out: decoder_blocks.* (3)" in notes
    assert "decoder_pos_embed" in notes
    assert "decoder_blocks.1" not in notes


def test_the_chosen_one_of_two_encoders_is_told(tmp_path: Path, state: State) -> None:
    both = {**under("q.", state), **under("k.", moved(state))}
    notes = "; ".join(built(tmp_path, both).weight_notes)
    assert "names under 'q.'" in notes
    assert "left out: k." in notes


def test_position_embeddings_are_resampled_to_the_size_of_the_images(
    tmp_path: Path, state: State
) -> None:
    base = built(tmp_path, {"state_dict": under("module.", state)}, img_size=24)
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6])
    assert torch.equal(base.model.pos_embed, expected)
    assert not base.head_is_new
    rest = {n: t for n, t in state.items() if n != "pos_embed"}
    assert_holds(base.model, {**rest, "pos_embed": expected})
    assert any("pos_embed adapted from (1, 17, 24) to (1, 37, 24)" in n for n in base.weight_notes)


def test_the_input_convolution_takes_other_channels(tmp_path: Path, state: State) -> None:
    weight = state["patch_embed.proj.weight"]
    grey = built(tmp_path, state, in_chans=1).model
    assert torch.equal(grey.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    five = built(tmp_path, state, in_chans=5).model
    expected = torch.cat([weight, weight[:, :2]], 1) * 3 / 5
    assert torch.allclose(five.patch_embed.proj.weight, expected)
    pretrained_on_grey = {**state, "patch_embed.proj.weight": weight[:, :1]}
    colour = built(tmp_path, pretrained_on_grey).model
    assert torch.allclose(colour.patch_embed.proj.weight, weight[:, :1].repeat(1, 3, 1, 1) / 3)


def test_older_names_are_translated_by_timm(tmp_path: Path) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, num_classes=4)
    own = model.state_dict()
    # Swin's authors count a stage's downsampling to the stage before, and call the head `head`
    old = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): t + 1
        for name, t in own.items()
        if t.is_floating_point()
    }
    torch.save({"model": old}, tmp_path / "swin.pth")
    source = ModelSource("swin_tiny_patch4_window7_224", SWIN, str(tmp_path / "swin.pth"))
    base = build(source, 4)
    assert not base.head_is_new
    assert_holds(
        base.model, {name: t + 1 if t.is_floating_point() else t for name, t in own.items()}
    )


SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (2, 2),
}


def test_a_file_of_timm_without_a_head_is_not_taken_for_older_names(tmp_path: Path) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "swin.pth")
    wider = {**SWIN, "window_size": 4}
    source = ModelSource("swin_tiny_patch4_window7_224", wider, str(tmp_path / "swin.pth"))
    base = build(source, 4)
    assert base.head_is_new
    name = "layers.1.downsample.reduction.weight"
    assert torch.equal(base.model.state_dict()[name], model.state_dict()[name])


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "a tensor less": (
        lambda s: {n: t for n, t in s.items() if n != "blocks.1.norm1.weight"},
        r"it lacks blocks\.1\.norm1\.weight \(\d+ of the model's \d+ tensors fit\)",
    ),
    "a block more": (
        lambda s: {**s, "blocks.2.norm1.weight": torch.ones(24)},
        r"it has, beyond the model, blocks\.2\.norm1\.weight",
    ),
    "no square of positions": (
        lambda s: {**s, "pos_embed": torch.zeros(1, 9, 24)},
        r"pos_embed is \(1, 9, 24\), the model's is \(1, 17, 24\)",
    ),
    "another width": (
        lambda s: {n: torch.cat([t, t]) for n, t in s.items()},
        r"cls_token is \(2, 1, 24\), the model's is \(1, 1, 24\) \(and \d+ more\)",
    ),
    "nothing of it": (lambda s: {"conv.weight": torch.ones(2)}, "is of another model: "),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_weights_of_another_model_are_refused_by_name(
    tmp_path: Path, state: State, change: Callable[[State], State], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        built(tmp_path, change(state))
    assert "\n" not in str(caught.value)


def test_a_last_norm_that_pre_training_did_without_starts_afresh(
    tmp_path: Path, state: State
) -> None:
    base = built(tmp_path, state, global_pool="avg")
    assert torch.equal(base.model.fc_norm.weight, torch.ones(24))
    notes = "; ".join(base.weight_notes)
    assert "not in it, so as initialised: fc_norm.weight" in notes
    assert "left out: norm." in notes


def test_a_head_for_other_classes_is_left_out_and_told(tmp_path: Path, state: State) -> None:
    told = "the head left out, as it is for other classes"
    assert told not in built(tmp_path, state).weight_notes
    base = built(tmp_path, {n: torch.cat([t, t]) if "head." in n else t for n, t in state.items()})
    assert base.head_is_new
    assert told in base.weight_notes


def test_a_head_is_left_out_of_a_model_built_for_features(tmp_path: Path, state: State) -> None:
    base = built(tmp_path, state, num_classes=0)
    assert_holds(base.model, state)


def test_a_head_may_have_a_norm_with_statistics(tmp_path: Path) -> None:
    small = {"embed_dim": (16, 16), "depth": (1, 1), "key_dim": 4, "num_heads": (1, 1)}
    model = timm.create_model("levit_128s", num_classes=0, **small)
    torch.save(model.state_dict(), tmp_path / "levit.pth")
    base = build(ModelSource("levit_128s", small, str(tmp_path / "levit.pth")), 4)
    assert base.head_is_new


def augreg(state: State) -> dict[str, np.ndarray]:
    """The arrays of a ViT as Google's AugReg files name and lay them out."""

    def heads(rows: Tensor) -> np.ndarray:  # [out, in] -> [in, heads, width of a head]
        return rows.T.reshape(24, 3, 8).numpy()

    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0).numpy(),
        "embedding/bias": state["patch_embed.proj.bias"].numpy(),
        "cls": state["cls_token"].numpy(),
        "Transformer/posembed_input/pos_embedding": state["pos_embed"].numpy(),
        "Transformer/encoder_norm/scale": state["norm.weight"].numpy(),
        "Transformer/encoder_norm/bias": state["norm.bias"].numpy(),
        "head/kernel": state["head.weight"].T.numpy(),
        "head/bias": state["head.bias"].numpy(),
    }
    for i in range(2):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        qkv = zip(
            ("query", "key", "value"),
            state[f"{ours}attn.qkv.weight"].chunk(3),
            state[f"{ours}attn.qkv.bias"].chunk(3),
            strict=True,
        )
        for name, weight, bias in qkv:
            arrays[f"{attention}{name}/kernel"] = heads(weight)
            arrays[f"{attention}{name}/bias"] = bias.reshape(3, 8).numpy()
        out = state[f"{ours}attn.proj.weight"].T.reshape(3, 8, 24)
        arrays[f"{attention}out/kernel"] = out.numpy()
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"].numpy()
        for k, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{k}/scale"] = state[f"{ours}{norm}.weight"].numpy()
            arrays[f"{theirs}LayerNorm_{k}/bias"] = state[f"{ours}{norm}.bias"].numpy()
        for k in range(2):
            dense = f"{theirs}MlpBlock_3/Dense_{k}/"
            arrays[f"{dense}kernel"] = state[f"{ours}mlp.fc{k + 1}.weight"].T.numpy()
            arrays[f"{dense}bias"] = state[f"{ours}mlp.fc{k + 1}.bias"].numpy()
    return arrays


def test_arrays_of_augreg_are_read(tmp_path: Path, state: State) -> None:
    np.savez(tmp_path / "w.npz", **augreg(state))
    source = ModelSource(NAME, TINY, str(tmp_path / "w.npz"))
    same, other = build(source, 5), build(source, 3)
    assert not same.head_is_new
    assert_holds(same.model, state)
    assert other.head_is_new
    fresh = build(ModelSource(NAME, TINY), 3).model
    assert torch.equal(other.model.head.weight, fresh.head.weight)
    larger = build(ModelSource(NAME, {**TINY, "img_size": 24}, source.weights), 3).model
    assert larger.pos_embed.shape == (1, 37, 24)
    assert torch.equal(larger.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (lambda a: a, {"depth": 1}, "it has 2 blocks, the model has 1"),
        (lambda a: {n: x for n, x in a.items() if "encoder_norm" not in n}, {}, "encoder_norm"),
        (lambda a: {"weights": np.zeros(2)}, {}, "is of another model"),
    ],
    ids=["more blocks", "a norm less", "other arrays"],
)
def test_arrays_of_another_model_are_refused(
    tmp_path: Path, state: State, change: Callable, args: dict, message: str
) -> None:
    np.savez(tmp_path / "w.npz", **change(augreg(state)))
    with pytest.raises(ValueError, match=message):
        build(ModelSource(NAME, {**TINY, **args}, str(tmp_path / "w.npz")), 5)


def test_arrays_for_an_architecture_that_has_no_such_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="for ViT and ResNetV2 alone, not ResNet"):
        build(ModelSource("resnet10t", {}, str(tmp_path / "w.npz")), 5)


def test_reading_weights_leaves_the_generator_as_building_does(
    tmp_path: Path, state: State
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    source = ModelSource(NAME, {**TINY, "img_size": 24}, str(tmp_path / "w.safetensors"))
    build(source, 3, seed=1)
    after = torch.get_rng_state()
    build(ModelSource(NAME, {**TINY, "img_size": 24}), 3, seed=1)
    assert torch.equal(after, torch.get_rng_state())
