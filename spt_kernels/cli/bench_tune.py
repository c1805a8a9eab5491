"""`spt-kernels bench tune`: the rates of the card at hand, measured, shown and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .terminal import Terminal, table
from .written import check_folder

if TYPE_CHECKING:
    from ..costs.rate_fit import FittedRates
    from ..costs.way_times import WayTimes
    from ..gradient_ways.gradient_cost import CardRates


def tune(terminal: Terminal, device: str) -> int:
    """Time every way to a sparse weight gradient, fit the rates to that, store them for the card.

    Raises:
        ValueError: there is no card, or the file is to be neither read nor written.
    """
    import torch

    from ..finetuning.device import pick_device

    card = pick_device(device)
    if card.type != "cuda":
        here = "there is no GPU here" if device == "auto" else f"got {device}"
        raise ValueError(f"--device: rates are a GPU's, expected cuda or cuda:N, {here}")
    from ..costs.machine import describe
    from ..costs.rate_fit import fit_rates
    from ..costs.rate_store import store_of_user, store_rates
    from ..costs.way_times import N_CASES, time_tf32, time_ways
    from ..gradient_ways.capability import capability_of
    from ..gradient_ways.gradient_cost import RATES

    path, machine = store_of_user(), describe(card)
    check_folder("rates", path.parent)
    with terminal.progress() as progress, torch.cuda.device(card):
        progress.start("measuring", N_CASES)
        times = []
        for one in time_ways(card):
            times.append(one)
            progress.advance(1, one.case)
        fitted = fit_rates(times, time_tf32(card))
    store_rates(path, machine.processor, fitted.rates, machine.versions)
    terminal.show(
        {
            "card": machine.processor,
            "rates": asdict(fitted.rates),
            "file": str(path),
            "times": [_as_json(one, fitted) for one in times],
        },
        _rates_table(machine.processor, fitted.rates, RATES[capability_of(card)]),
        "",
        _times_table(times, fitted),
        "",
        _verdict(times, fitted),
        f"written to {path}",
    )
    return 0


def _rates_table(card: str, fitted: CardRates, shipped: CardRates) -> Any:
    columns = [vars(rates) for rates in (fitted.narrow, shipped.narrow, fitted.fp32, shipped.fp32)]
    rows = [(term, *(_number(rates[term]) for rates in columns)) for term in columns[0]]
    gains = (f"{rates.tf32_gain:.3g}" for rates in (fitted, shipped))
    rows.append(("TF32's gain", "", "", *gains))
    titles = ("in dense products", "16 bits", "shipped", "fp32", "shipped")
    return table(titles, rows, f"Rates of {card}")


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _times_table(times: Sequence[WayTimes], fitted: FittedRates) -> Any:
    rows = []
    for one in times:
        predicted = fitted.predicted_us(one)
        pairs = (f"{one.us[way]:,.0f} / {predicted[way]:,.0f}" for way in one.us)
        rows.append((one.case, *pairs, fitted.taken(one).value))
    titles = ("µs, measured / predicted", *(way.value for way in times[0].us), "taken")
    return table(titles, rows, is_wide=True)


def _verdict(times: Sequence[WayTimes], fitted: FittedRates) -> str:
    """How often the fastest way is taken, and what is lost where it is not."""
    lost = [one.us[fitted.taken(one)] / min(one.us.values()) - 1 for one in times]
    best = sum(loss == 0 for loss in lost)
    return (
        f"the fastest way is taken in {best} of {len(lost)} cases; at most {max(lost):.0%} is lost"
    )


def _as_json(one: WayTimes, fitted: FittedRates) -> dict[str, Any]:
    predicted = fitted.predicted_us(one)
    return {
        "case": one.case,
        "taken": fitted.taken(one).value,
        "measured_us": {way.value: us for way, us in one.us.items()},
        "predicted_us": {way.value: predicted[way] for way in one.us},
    }
