"""Rates on disk: one file for all cards of a user, which each card's first use reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from ..gradient_ways.gradient_cost import CardRates
from ..gradient_ways.stored_rates import FORMAT, VARIABLE, rates_file, read_rates


def store_of_user() -> Path:
    """The file that rates are added to, told before anything is measured.

    Raises:
        ValueError: there is to be none, or it holds no rates, or damaged ones.
    """
    path = rates_file()
    if path is None:
        raise ValueError(f"{VARIABLE}: expected the file to store rates in, it is set to nothing")
    if path.exists():
        read_rates(path)
    return path


def store_rates(path: Path, card: str, rates: CardRates, about: Mapping[str, str]) -> None:
    """Add a card's rates to the file, in place of those that it has of that card.

    Args:
        path: made if it is missing, with its folder.
        card: as torch names it.
        rates: to be chosen by.
        about: what they were measured with, for people.

    Raises:
        ValueError: the file holds no rates, or damaged ones.
    """
    document: dict[str, Any] = {"format": FORMAT, "cards": {}}
    if path.exists():
        read_rates(path)
        document = json.loads(path.read_text(encoding="utf-8"))
    document["cards"][card] = {**asdict(rates), "about": dict(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(document, indent=1)}\n".encode())
