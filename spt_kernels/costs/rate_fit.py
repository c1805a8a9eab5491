"""The rates that explain the times of a card's ways best, by least squares of relative errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gradient_ways.gradient_cost import CardRates, Rates, Way, Work, cheapest_way
from .way_times import WayTimes


@dataclass(frozen=True)
class FittedRates:
    """What a card's times amount to.

    Attributes:
        rates: to choose by.
        product_ps: one product of torch's dense product, in picoseconds, by whether it is of fp32.
    """

    rates: CardRates
    product_ps: Mapping[bool, float]

    def predicted_us(self, times: WayTimes) -> dict[Way, float]:
        """What the rates say that every way takes."""
        rates = self.rates.fp32 if times.is_fp32 else self.rates.narrow
        per_cost = self.product_ps[times.is_fp32] * times.tokens * 1e-6
        return {way: cost * per_cost for way, cost in times.work.costs(rates).items()}

    def taken(self, times: WayTimes) -> Way:
        """The way that is chosen by the rates."""
        return cheapest_way(times.work, self.rates, is_fp32=times.is_fp32)


def fit_rates(times: Sequence[WayTimes], tf32_gain: float) -> FittedRates:
    """Rates from times of every way at several sizes, in fp32 and in 16 bits."""
    of_narrow, of_fp32 = (
        _fit([one for one in times if one.is_fp32 == is_fp32]) for is_fp32 in (False, True)
    )
    product_ps = {False: of_narrow[1], True: of_fp32[1]}
    return FittedRates(CardRates(of_narrow[0], of_fp32[0], tf32_gain), product_ps)


def _fit(times: Sequence[WayTimes]) -> tuple[Rates, float]:
    """Rates of one precision, and the picoseconds of a dense product's product."""
    works = [one.work for one in times]
    ps = {way: _column(1e6 * one.us[way] / one.tokens for one in times) for way in Way}
    elements = _column(work.elements for work in works)
    product, called = _solve([elements, torch.ones_like(elements)], ps[Way.DENSE])
    (gathered,) = _solve([_column(work.entries for work in works)], ps[Way.VECTORS])
    tiles = _fit_tiles(works, ps[Way.TILES])
    rates = replace(tiles, gathered=gathered, called=called)
    return Rates(**{name: rate / product for name, rate in vars(rates).items()}), product


def _fit_tiles(works: Sequence[Work], ps: Tensor) -> Rates:
    """The picoseconds of tiles, whose programs either compute or wait for what they read.

    Those wait that read the most for each element: from which share on, every share is tried.
    """
    tiled, staged = _column(w.tiled for w in works), _column(w.staged for w in works)
    beforehand = [_column(w.selected for w in works), _column(w.copied for w in works)]
    share = staged / tiled
    best, least = None, math.inf
    for bound in (*share.unique().tolist(), math.inf):
        waits = share >= bound
        terms = [tiled * ~waits, staged * waits, *beforehand]
        found = _solve(terms, ps)
        # what no time tells is as high as the times allow
        if not waits.any():
            found[1] = float((found[0] * tiled / staged).min())
        elif waits.all():
            found[0] = float((found[1] * staged / tiled).min())
        predicted = torch.maximum(found[0] * tiled, found[1] * staged)
        predicted += found[2] * beforehand[0] + found[3] * beforehand[1]
        error = float(((predicted - ps) / ps).square().sum())
        if error < least:
            best, least = found, error
    assert best is not None
    tiled_ps, staged_ps, selected_ps, copied_ps = best
    return Rates(0, tiled_ps, staged_ps, copied=copied_ps, selected=selected_ps, called=0)


def _solve(terms: Sequence[Tensor], ps: Tensor) -> list[float]:
    """Rates of at least zero with the smallest sum of squared relative errors."""
    system = torch.stack(list(terms), dim=1) / ps[:, None]
    free = list(range(len(terms)))
    while True:
        rates = torch.zeros(len(terms), dtype=torch.float64)
        rates[free] = torch.linalg.lstsq(system[:, free], torch.ones_like(ps), driver="gelsd")[0]
        negative = [term for term in free if rates[term] < 0]
        if not negative:
            return rates.tolist()
        free.remove(min(negative, key=lambda term: float(rates[term])))


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
