"""A card's rates, fitted to the times of its ways."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.costs.rate_fit import FittedRates, fit_rates
from spt_kernels.costs.way_times import N_CASES, WayTimes, time_tf32, time_ways
from spt_kernels.gradient_ways.gradient_cost import CardRates

from .planted import CPU, PLANTED, TOKENS, planted_clock


def timed_again(times: list[WayTimes], rates: CardRates, noise: float = 0.0) -> list[WayTimes]:
    """The same cases on a card of these rates, whose times scatter."""
    card = FittedRates(rates, {False: 8.0, True: 120.0})
    chance = random.Random(0)
    return [
        replace(
            one,
            us={
                way: us * math.exp(chance.gauss(0, noise))
                for way, us in card.predicted_us(one).items()
            },
        )
        for one in times
    ]


@pytest.fixture(scope="module")
def exact() -> list[WayTimes]:
    return list(time_ways(CPU, planted_clock(PLANTED), TOKENS))


def test_planted_rates_are_found_again(exact: list[WayTimes]) -> None:
    assert len(exact) == N_CASES
    gain = time_tf32(CPU, planted_clock(PLANTED), TOKENS)
    fitted = fit_rates(exact, gain)
    assert fitted.rates.tf32_gain == pytest.approx(PLANTED.tf32_gain)
    for found, planted in (
        (fitted.rates.narrow, PLANTED.narrow),
        (fitted.rates.fp32, PLANTED.fp32),
    ):
        assert vars(found) == pytest.approx(vars(planted), rel=1e-6)
    assert fitted.product_ps == pytest.approx({False: 8.0, True: 120.0})
    for one in exact:
        assert fitted.predicted_us(one) == pytest.approx(one.us)
        assert fitted.taken(one) is min(one.us, key=lambda way: one.us[way])


def test_noise_moves_predictions_no_further_than_itself(exact: list[WayTimes]) -> None:
    fitted = fit_rates(timed_again(exact, PLANTED, noise=0.05), 1.0)
    for one in exact:
        assert fitted.predicted_us(one) == pytest.approx(one.us, rel=0.1)


def test_a_term_that_no_time_tells_is_as_high_as_the_times_allow(
    exact: list[WayTimes],
) -> None:
    # of every tile it is the arithmetic that takes long
    computing = replace(PLANTED.narrow, staged=1e-3)
    times = timed_again(exact, replace(PLANTED, narrow=computing))
    narrow = fit_rates(times, 1.0).rates.narrow
    assert narrow.tiled == pytest.approx(computing.tiled)
    works = [one.work for one in times if not one.is_fp32]
    least = min(computing.tiled * work.tiled / work.staged for work in works)
    assert narrow.staged == pytest.approx(least)
