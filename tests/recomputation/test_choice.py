"""Which parts of which blocks are chosen, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from torch import nn

from spt_kernels import recompute
from spt_kernels.recomputation import Recomputation, recompute_by
from tests.models import tiny_convnext, tiny_resnet, tiny_swin, tiny_vit


def n_hooks(model: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.startswith(("_forward_hooks", "_forward_pre_hooks"))
    )


def test_one_option_for_all_blocks() -> None:
    chosen = recompute(tiny_vit(depth=3), "mlp")
    assert chosen.blocks == {f"blocks.{n}": ("mlp",) for n in range(3)}
    assert chosen.modules == {f"blocks.{n}.mlp": "mlp" for n in range(3)}
    assert chosen


def test_some_blocks_alone() -> None:
    chosen = recompute(tiny_vit(depth=3), {"blocks.0": ("qkv", "mlp"), "blocks.2": "block"})
    assert chosen.blocks == {"blocks.0": ("mlp", "qkv"), "blocks.1": (), "blocks.2": ("block",)}
    assert list(chosen.modules) == ["blocks.0.mlp", "blocks.0.attn", "blocks.2"]


def test_parts_of_others_are_left_out() -> None:
    model = tiny_vit(depth=1)
    assert recompute(model, ("qkv", "attention")).blocks == {"blocks.0": ("attention",)}
    assert recompute(model, ("mlp", "block", "qkv")).blocks == {"blocks.0": ("block",)}


def test_the_last_call_counts() -> None:
    model = tiny_vit()
    assert n_hooks(model) == 0
    recompute(model, ("mlp", "attention"))
    recompute(model, "block")
    once = n_hooks(model)
    recompute(model, "block")
    assert n_hooks(model) == once
    assert not recompute(model, "nothing")
    assert n_hooks(model) == 0
    assert not recompute(model, ())


def test_families_have_what_they_have() -> None:
    swin = recompute(tiny_swin(), "attention")
    assert list(swin.blocks) == [f"layers.{s}.blocks.{b}" for s in range(2) for b in range(2)]
    convnext = tiny_convnext()
    assert set(recompute(convnext, "mlp").modules.values()) == {"mlp"}
    with pytest.raises(ValueError, match="no block of ConvNeXt has a part for 'qkv'"):
        recompute(convnext, "qkv")
    assert len(recompute(tiny_resnet(), "block").modules) == 4


def test_an_mlp_of_positions_is_a_part_of_its_attention() -> None:
    shape = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1,), "num_heads": (2,)}
    model = timm.create_model("swinv2_tiny_window8_256", **shape)
    block = "layers.0.blocks.0"
    assert recompute(model, ("mlp", "attention")).modules == {
        f"{block}.mlp": "mlp",
        f"{block}.attn": "attention",
    }


def test_a_single_matrix_is_no_attention_and_no_mlp() -> None:
    parts = {"attn": nn.MultiheadAttention(8, 2), "shortcut_attn": nn.Linear(8, 8)}
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(parts)])})
    assert recompute(model, "qkv").modules == {"blocks.0.attn": "qkv"}
    model.blocks[0].ffn = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="no block of ModuleDict has a part for 'mlp'"):
        recompute(model, "mlp")


def test_an_attention_that_is_not_fused_is_refused_at_once() -> None:
    model = tiny_swin()
    block = next(iter(recompute(model, "mlp").blocks))
    before = n_hooks(model)
    for what, named in (("qkv", "no block of"), ({block: ("mlp", "qkv")}, f"{block} has no part")):
        with pytest.raises(ValueError, match=f"{named} .*'qkv', as its attention is not"):
            recompute(model, what)
    with pytest.raises(ValueError, match=r"recompute: no block .* 'qkv', as its attention"):
        recompute_by(model, "mlp,qkv")
    assert n_hooks(model) == before
    assert recompute(model, ("mlp", "attention"))


def test_an_attention_that_is_fused_by_a_switch() -> None:
    model = tiny_swin()
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.fused_attn = True
    assert set(recompute(model, "qkv").modules.values()) == {"qkv"}


def test_the_summary_joins_neighbours() -> None:
    model = tiny_vit(depth=4)
    chosen = recompute(model, {"blocks.1": ("mlp", "qkv"), "blocks.2": ("mlp", "qkv")})
    assert chosen.summary().splitlines() == [
        "block                 computed again in the backward",
        "blocks.0              nothing",
        "blocks.1 to blocks.2  mlp and qkv",
        "blocks.3              nothing",
    ]


def test_it_cannot_be_changed() -> None:
    chosen = Recomputation({"blocks.0": ("mlp",)}, {"blocks.0.mlp": "mlp"})
    with pytest.raises(TypeError):
        chosen.blocks["blocks.1"] = ("mlp",)  # type: ignore[index]


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("mpl", ValueError, "what must be of mlp, qkv, attention, block, or nothing, got 'mpl'"),
        (("mlp", 3), ValueError, "what must be of mlp, .*, got 3"),
        (3, TypeError, "what must be an option, several, or a mapping of blocks to such, got 3"),
        ({"blocks.7": "mlp"}, ValueError, "has blocks blocks.0, blocks.1, got 'blocks.7'"),
        ({"blocks.0": "mpl"}, ValueError, "what must be of mlp"),
    ],
)
def test_mistakes_change_nothing(what: Any, error: type[Exception], message: str) -> None:
    model = tiny_vit()
    recompute(model, "mlp")
    before = n_hooks(model)
    with pytest.raises(error, match=message):
        recompute(model, what)
    assert n_hooks(model) == before


def test_what_is_no_model_with_blocks() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        recompute(3, "mlp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no blocks that can be told by name"):
        recompute(nn.Linear(2, 2), "block")
    model = tiny_vit(depth=1)
    model.blocks[0].mlp = nn.Identity()
    with pytest.raises(ValueError, match="no block of VisionTransformer has a part for 'mlp'"):
        recompute(model, "mlp")
    with pytest.raises(ValueError, match=r"blocks\.0 has no part for 'mlp'"):
        recompute(model, {"blocks.0": "mlp"})
