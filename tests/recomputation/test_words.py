"""What is computed again, as a line of text, against choices written out."""

from __future__ import annotations

import pytest

from spt_kernels.recomputation import RecomputeWords, recompute, recompute_by
from tests.models import tiny_vit

EVERY = ("mlp", "qkv", "attention", "block")
# the last has an MLP alone
BLOCKS = {f"blocks.{n}": EVERY for n in range(4)} | {"blocks.4": ("mlp", "block")}


@pytest.mark.parametrize(
    ("line", "chosen"),
    [
        ("mlp", [("mlp",)] * 5),
        ("attention", [("attention",)] * 4 + [()]),
        ("block@0-1,mlp@2-4, qkv@3", [("block",)] * 2 + [("mlp",), ("mlp", "qkv"), ("mlp",)]),
        ("block@4", [()] * 4 + [("block",)]),
    ],
)
def test_a_line_and_its_blocks(line: str, chosen: list[tuple[str, ...]]) -> None:
    found = RecomputeWords.parse(line).for_blocks(BLOCKS)
    assert list(found.values()) == chosen
    told = str(RecomputeWords.of(found))
    assert RecomputeWords.parse(told).for_blocks(BLOCKS) == found, told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected mlp, qkv, attention, block.*got ''"),
        ("mlp,", "got 'mlp,'"),
        ("mlp@", "got 'mlp@'"),
        ("heads", "got 'heads'"),
        ("mlp@3-1", "'mlp@3-1' ends before it begins"),
        ("mlp@0-5", "the model has 5 blocks, from 0 on"),
        ("qkv@2-4", "blocks.4 has no part for 'qkv'"),
    ],
)
def test_what_is_no_line_of_this_model(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecomputeWords.parse(line).for_blocks(BLOCKS)


def test_a_model_by_a_line() -> None:
    found = recompute_by(tiny_vit(), "mlp@1,block@0")
    assert found == recompute(tiny_vit(), {"blocks.0": "block", "blocks.1": "mlp"})
