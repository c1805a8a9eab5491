"""Checkpoints of exactly the form in which MAE and MoCo v3 publish their ViTs, at a small size."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spt_kernels.finetuning.base.models import BaseModel, ModelSource, build

from .pictures_on_disk import TINY

NAME = "vit_base_patch16_224"
WIDTH, DEPTH, N_PATCHES = 24, 2, 16
State = dict[str, Tensor]


def encoder() -> State:
    """A ViT of the size of `TINY` by its authors' names, without a head."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + N_PATCHES, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for name, shape in {
            "norm1": (WIDTH,),
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "norm2": (WIDTH,),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def mae_pretrained() -> dict[str, object]:
    """mae_pretrain_vit_base.pth: the encoder alone."""
    return {"model": encoder()}


def mae_with_decoder() -> dict[str, object]:
    """mae_visualize_vit_base.pth, and what its training writes: the decoder besides."""
    state = encoder()
    state["mask_token"] = torch.zeros(1, 1, 16)
    state["decoder_pos_embed"] = torch.zeros(1, 1 + N_PATCHES, 16)
    state |= {"decoder_embed.weight": torch.zeros(16, WIDTH), "decoder_embed.bias": torch.zeros(16)}
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        state[f"decoder_blocks.0.{name}.weight"] = torch.zeros(16)
        state[f"decoder_blocks.0.{name}.bias"] = torch.zeros(16)
    state |= {f"decoder_norm.{n}": torch.zeros(16) for n in ("weight", "bias")}
    state |= {"decoder_pred.weight": torch.zeros(48, 16), "decoder_pred.bias": torch.zeros(48)}
    args = argparse.Namespace(model="mae_vit_base_patch16")
    return {"model": state, "optimizer": {"state": {}}, "epoch": 399, "scaler": {}, "args": args}


def mae_finetuned() -> dict[str, object]:
    """mae_finetuned_vit_base.pth: pooled over the patches, with a head of a thousand classes."""
    state = encoder()
    for local in ("weight", "bias"):
        state[f"fc_norm.{local}"] = state.pop(f"norm.{local}")
    state |= {"head.weight": torch.randn(1000, WIDTH), "head.bias": torch.randn(1000)}
    return {"model": state}


def _mlp(prefix: str, n_layers: int, n_in: int) -> State:
    """MoCo v3's projector or predictor: Linears without biases, each with a BatchNorm."""
    state: State = {}
    for layer in range(n_layers):
        n_out = 8 if layer == n_layers - 1 else 12
        linear, norm = f"{prefix}.{3 * layer}", f"{prefix}.{3 * layer + 1}"
        state[f"{linear}.weight"] = torch.randn(n_out, n_in)
        if layer < n_layers - 1:
            state |= {f"{norm}.{local}": torch.ones(n_out) for local in ("weight", "bias")}
        state |= {f"{norm}.{local}": torch.ones(n_out) for local in ("running_mean", "running_var")}
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
        n_in = n_out
    return state


def moco_v3() -> dict[str, object]:
    """vit-b-300ep.pth.tar: two encoders with projectors for heads, and a predictor."""
    state: State = {}
    for which, shift in (("base", 0.0), ("momentum", 1.0)):
        prefix = f"module.{which}_encoder."
        state |= {prefix + name: tensor + shift for name, tensor in encoder().items()}
        state |= _mlp(f"{prefix}head", 3, WIDTH)
    state |= _mlp("module.predictor", 2, 8)
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {}, "scaler": {}}


def moco_v3_linear() -> dict[str, object]:
    """linear-vit-b-300ep.pth.tar: the encoder with a linear classifier."""
    state = encoder() | {"head.weight": torch.randn(1000, WIDTH), "head.bias": torch.randn(1000)}
    return {
        "epoch": 90,
        "arch": "vit_base",
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "best_acc1": torch.tensor(76.7),
        "optimizer": {},
    }


def built(folder: Path, content: object, file: str, **args: object) -> BaseModel:
    torch.save(content, folder / file)
    return build(ModelSource(NAME, {**TINY, **args}, str(folder / file)), 5)


PUBLISHED = {
    "mae_pretrain_vit_base.pth": mae_pretrained,
    "mae_visualize_vit_base.pth": mae_with_decoder,
    "vit-b-300ep.pth.tar": moco_v3,
    "linear-vit-b-300ep.pth.tar": moco_v3_linear,
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_the_encoder_arrives_whole_and_the_head_is_new(file: str, tmp_path: Path) -> None:
    base = built(tmp_path, PUBLISHED[file](), file)
    assert base.head_is_new
    state = {n: t for n, t in base.model.state_dict().items() if not n.startswith("head.")}
    assert state.keys() == encoder().keys()
    for name, tensor in encoder().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("file", PUBLISHED)
def test_pooled_over_patches_everything_but_the_last_norm_is_theirs(
    file: str, tmp_path: Path
) -> None:
    base = built(tmp_path, PUBLISHED[file](), file, global_pool="avg")
    state = base.model.state_dict()
    for name, tensor in encoder().items():
        if not name.startswith("norm."):
            assert torch.equal(state[name], tensor), name
    # MAE's own fine-tuning starts this norm anew, too
    assert torch.equal(state["fc_norm.weight"], torch.ones(WIDTH))
    assert any("fc_norm.weight" in note for note in base.weight_notes)


def test_what_was_fine_tuned_with_pooled_patches_has_that_norm(tmp_path: Path) -> None:
    content = mae_finetuned()
    base = built(tmp_path, content, "mae_finetuned_vit_base.pth", global_pool="avg")
    assert base.head_is_new
    given: State = content["model"]  # type: ignore[assignment]
    for name, tensor in base.model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, given[name]), name


def test_what_was_taken_of_two_encoders_is_told(tmp_path: Path) -> None:
    notes = "; ".join(built(tmp_path, moco_v3(), "vit-b-300ep.pth.tar").weight_notes)
    assert "names under 'module.base_encoder.'" in notes
    assert "module.momentum_encoder" in notes
    assert "module.predictor" in notes
