"""The way to a sparse weight gradient: rates follow from the cards, and choices from the rates."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cards import CARDS, Card
from bench.gradient_model import rates_of
from bench.measured import H100_WAYS, MeasuredWays
from spt_kernels.costs.drawn_mask import draw_mask
from spt_kernels.gradient_ways.gradient_cost import RATES, RATES_BY_NAME, Way, Work, cheapest_way
from spt_kernels.gradient_ways.tile_plan import plan_tiles

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# of two cards with one capability the rates are those of the first
FIRST_CARDS = list({card.capability: card for card in reversed(CARDS)}.values())


@pytest.mark.parametrize("is_fp32", [False, True], ids=["narrow", "fp32"])
@pytest.mark.parametrize("card", FIRST_CARDS, ids=lambda card: card.name)
def test_rates_are_those_of_the_model(card: Card, is_fp32: bool) -> None:
    derived = asdict(rates_of(card, is_fp32=is_fp32))
    rates = RATES[card.capability]
    for name, shipped in asdict(rates.fp32 if is_fp32 else rates.narrow).items():
        assert shipped == pytest.approx(derived[name], rel=0.03), name


@pytest.mark.parametrize("case", H100_WAYS, ids=str)
def test_what_is_taken_was_the_fastest_on_a_card(case: MeasuredWays) -> None:
    share = 0.25 if case.in_a_quarter else 1.0
    index = draw_mask(case.rows, case.columns, case.density, share)
    work = work_of(index, case.rows, case.columns)
    assert cheapest_way(work, RATES[90], is_fp32=case.is_fp32) is case.fastest


H200_TIMES = [
    time
    for time in json.loads((RESULTS / "gpu" / "ways.json").read_text())["times"]
    if "1024" not in time["case"] and "5.0%" not in time["case"]
]


@pytest.mark.parametrize("time", H200_TIMES, ids=lambda time: time["case"])
def test_what_is_taken_on_an_h200_was_about_the_fastest(time: dict[str, Any]) -> None:
    rows, columns, dtype, percent = re.match(  # type: ignore[union-attr]
        r"(\d+)×(\d+), (\w+), ([\d.]+)%", time["case"]
    ).groups()
    share = 0.25 if time["case"].endswith("0.25²") else 1.0
    index = draw_mask(int(rows), int(columns), float(percent) / 100, share)
    rates = RATES_BY_NAME["NVIDIA H200"]
    taken = cheapest_way(
        work_of(index, int(rows), int(columns)), rates, is_fp32=dtype == "fp32"
    ).value
    us = time["measured_us"]
    # fp32's vectors of a few entries waited for their reads, which was mended afterwards
    assert us[taken] <= (2.0 if dtype == "fp32" else 1.1) * min(us.values())


def work_of(index: torch.Tensor, rows: int, columns: int) -> Work:
    return Work.of(plan_tiles(index, rows, columns), len(index), (rows, columns))


@pytest.mark.parametrize(
    ("density", "capability", "is_fp32", "way"),
    [
        (0.0001, 90, False, Way.VECTORS),
        (0.005, 80, False, Way.TILES),
        (0.02, 80, True, Way.TILES),
        (0.005, 86, True, Way.VECTORS),
        (0.05, 86, True, Way.DENSE),
    ],
)
def test_choices_at_fc1(density: float, capability: int, is_fp32: bool, way: Way) -> None:
    work = work_of(draw_mask(3072, 768, density), 3072, 768)
    assert cheapest_way(work, RATES[capability], is_fp32=is_fp32) is way


def test_where_tf32_is_allowed_the_dense_product_is_hard_to_beat() -> None:
    for density, way in ((0.0001, Way.VECTORS), (0.005, Way.DENSE), (0.02, Way.DENSE)):
        work = work_of(draw_mask(3072, 768, density), 3072, 768)
        assert cheapest_way(work, RATES[90], is_fp32=True, allows_tf32=True) is way
        narrow, allowed = (
            cheapest_way(work, RATES[90], is_fp32=False, allows_tf32=allows)
            for allows in (False, True)
        )
        assert narrow is allowed  # of no matter in 16 bits


def test_without_a_plan_no_tiles() -> None:
    for nnz in (10, 10**4, 10**6):
        way = cheapest_way(Work.of(None, nnz, (3072, 768)), RATES[90], is_fp32=True)
        assert way is (Way.DENSE if nnz > 10**5 else Way.VECTORS)
