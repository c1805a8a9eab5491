"""The rates by which a card chooses: those that `bench tune` stored for it, else the shipped."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .capability import capability_of
from .gradient_cost import RATES, RATES_BY_NAME, CardRates, Rates

VARIABLE = "SPT_KERNELS_RATES"  # names another file than the user's; empty: the shipped rates alone
FORMAT = "spt_kernels.rates/1"


def rates_file() -> Path | None:
    """Where rates are stored: `SPT_KERNELS_RATES`, else a file in the user's XDG_CONFIG_HOME."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(folder):  # which the specification bids to ignore
        folder = os.path.expanduser("~/.config")
    return Path(folder) / "spt_kernels" / "rates.json"


@functools.cache
def rates_on(device: torch.device) -> CardRates:
    """The rates of a card; read once, so that a process chooses the same way all along.

    Raises:
        ValueError: the file that they are stored in is damaged.
        FileNotFoundError: `SPT_KERNELS_RATES` names none.
    """
    shipped, path = RATES[capability_of(device)], rates_file()
    if device.type != "cuda":
        return shipped
    card = torch.cuda.get_device_name(device)
    shipped = RATES_BY_NAME.get(card, shipped)
    if path is None:
        return shipped
    # unlike `Path.exists`, False where a folder on the way is another user's
    if not (os.path.exists(path) or VARIABLE in os.environ):
        return shipped
    stored = read_rates(path)
    if card not in stored:
        others = ", ".join(stored) or "no card"
        warnings.warn(
            f"{path}: has rates of {others}, none of {card}, which goes by the shipped ones "
            "(spt-kernels bench tune measures it)",
            stacklevel=2,
        )
    return stored.get(card, shipped)


def read_rates(path: Path) -> dict[str, CardRates]:
    """The rates in a file, by the name of the card.

    Raises:
        ValueError: it is no file of rates, or a damaged one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected the format {FORMAT}")
        return {card: _parse(card, value) for card, value in found["cards"].items()}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: no usable rates: {error} (remove it, and measure with spt-kernels bench tune)"
        ) from error


def _parse(card: str, value: Mapping[str, Any]) -> CardRates:
    gain = _number(f"{card}: tf32_gain", value["tf32_gain"])
    if gain == 0:
        raise ValueError(f"{card}: tf32_gain: expected more than zero")
    narrow, fp32 = (_rates(f"{card}: {of}", value[of]) for of in ("narrow", "fp32"))
    return CardRates(narrow, fp32, gain)


def _rates(name: str, value: Mapping[str, Any]) -> Rates:
    known = {field.name for field in fields(Rates)}
    if value.keys() != known:
        raise ValueError(f"{name}: expected {sorted(known)}, got {sorted(value)}")
    return Rates(**{term: _number(f"{name}: {term}", rate) for term, rate in value.items()})


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected a number not below zero, got {value!r}")
    return float(value)
