"""Methods in one memory, each by its fastest way: what `spt-kernels fit` shows."""

from __future__ import annotations

import pytest

from spt_kernels.fitting import CARDS, Fitting, compare_ways
from spt_kernels.methods import Method
from tests.models import tiny_vit

BATCH, SHAPE = 16, (3, 16, 16)
METHODS = {"the head": Method("linear"), "all": Method("full")}


def test_the_fastest_comes_first_and_what_fits_nowhere_last() -> None:
    model, card = tiny_vit(), CARDS["H100"]
    heads = Fitting(model, SHAPE, BATCH, method="linear", dtype="fp32", card=card)
    limit = heads.least().peak_bytes
    heard: list[tuple[int, str]] = []
    ways = compare_ways(
        *(model, (BATCH, *SHAPE), METHODS, limit),
        card=card,
        dtypes=("fp32",),
        on_trial=lambda done, what: heard.append((done, what)),
    )
    assert [(way.method, way.fits) for way in ways] == [("the head", True), ("all", False)]
    fastest = heads.fastest(limit)
    assert fastest is not None
    assert ways[0].way.peak_bytes == fastest.peak_bytes <= limit
    assert ways[0].way.seconds == fastest.seconds
    assert ways[1].way.peak_bytes > limit
    assert [what for done, what in heard if done] == ["the head, fp32", "all, fp32"]
    assert not ways[0].others


def test_what_a_picture_shows_beside_is_found_where_it_is_asked_for() -> None:
    methods = {"the head": Method("linear")}
    [way] = compare_ways(
        tiny_vit(), (BATCH, *SHAPE), methods, 2**30, dtypes=("fp32",), with_others=True
    )
    assert {other.micro_batch for other in way.others} >= {1, BATCH}


def test_a_method_that_cannot_tune_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="budget"):
        compare_ways(tiny_vit(), (BATCH, *SHAPE), {"much": Method("spt-lora", 10**9)}, 2**30)
