"""Heads as they are told, by names and patterns, and put into words."""

from __future__ import annotations

import pytest
from torch import nn

from spt_kernels.model import backbone_numel, candidate_names, head_line, head_names, head_numel
from spt_kernels.model.head import as_patterns, layers_of, parts_of
from tests.models import tiny_vit

WEIGHT_AND_BIAS = ("weight", "bias")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("head", ("head.weight", "head.bias")),
        ("head.*", ("head.weight", "head.bias")),
        (["head.bias"], ("head.bias",)),
        (["head", "norm"], ("norm.weight", "norm.bias", "head.weight", "head.bias")),
        ("blocks.*.norm2", tuple(f"blocks.{i}.norm2.{n}" for i in "01" for n in WEIGHT_AND_BIAS)),
        ("none", ()),
        ((), ()),
    ],
)
def test_a_head_is_told_by_names_of_layers_or_by_patterns(head, expected) -> None:
    model = tiny_vit()
    assert head_names(model, head) == expected
    assert head_numel(model, head) == sum(model.get_parameter(n).numel() for n in expected)
    n_all = sum(p.numel() for p in model.parameters())
    assert backbone_numel(model, head) == n_all - head_numel(model, head)
    assert set(expected).isdisjoint(candidate_names(model, head=head))


def test_without_a_head_the_classifier_is_a_candidate() -> None:
    assert {"head.weight", "head.bias"} <= set(candidate_names(tiny_vit(), head=()))


def test_a_head_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"head: 'classifier' matches no parameter and no module"):
        head_names(tiny_vit(), ["head", "classifier"])
    with pytest.raises(TypeError, match="head: expected names or patterns, got"):
        head_names(tiny_vit(), [nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="head: expected names or patterns, got 3"):
        as_patterns(3)


def test_layers_and_modules_in_words() -> None:
    assert layers_of(["a.weight", "a.bias", "b.weight", "scale"]) == ["a", "b.weight", "scale"]
    every = ["t.a.weight", "t.a.bias", "t.b.weight", "u.a.weight", "u.a.bias", "scale"]
    assert parts_of(["t.a.weight", "t.a.bias", "t.b.weight", "scale"], every) == ["t", "scale"]
    assert parts_of(["t.a.weight", "u.a.weight", "u.a.bias"], every) == ["t.a.weight", "u"]


def test_the_line_names_the_head_or_says_that_there_is_none() -> None:
    assert head_line(("score.weight", "score.bias"), "loss") == (
        "score (trained whole, not in the budget)"
    )
    many = [f"decode_head.{i}.weight" for i in range(6)]
    assert head_line(many, "given", ["encoder.weight"]).startswith("decode_head (trained")
    assert head_line((), "loss").startswith("none found")
    assert head_line((), "given").startswith("none, as asked for")
    assert head_line((), "names").startswith("none by name")
    assert head_line((), "").startswith("not decided")
