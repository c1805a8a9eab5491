"""Rates in a user's file: kept for the card, chosen by, refused where damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spt_kernels.costs.rate_store import store_of_user, store_rates
from spt_kernels.gradient_ways import stored_rates
from spt_kernels.gradient_ways.gradient_cost import RATES, RATES_BY_NAME, Way, Work, cheapest_way
from spt_kernels.gradient_ways.stored_rates import rates_on, read_rates
from tests.card.pretend import pretended_card

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CARD = "a pretended card"
OURS = replace(RATES[90], narrow=replace(RATES[90].narrow, gathered=1.0))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config" / "rates.json"
    monkeypatch.setenv(stored_rates.VARIABLE, str(path))
    rates_on.cache_clear()
    return path


def test_stored_rates_come_back_and_leave_those_of_other_cards(file: Path) -> None:
    assert store_of_user() == file
    store_rates(file, "another card", RATES[86], {"torch": "1"})
    store_rates(file, CARD, RATES[80], {"torch": "2"})
    store_rates(file, CARD, OURS, {"torch": "3"})
    assert read_rates(file) == {"another card": RATES[86], CARD: OURS}
    assert json.loads(file.read_text())["cards"]["another card"]["about"] == {"torch": "1"}


def test_a_card_chooses_by_what_is_stored_for_it(file: Path) -> None:
    work = Work(entries=10**5, elements=10**6)
    with pretended_card():
        with pytest.raises(FileNotFoundError, match=r"rates\.json"):
            rates_on(CUDA)  # the variable names it
        store_rates(file, CARD, OURS, {})
        chosen = [cheapest_way(work, rates, is_fp32=False) for rates in (RATES[90], rates_on(CUDA))]
        assert chosen == [Way.DENSE, Way.VECTORS]
        store_rates(file, CARD, RATES[80], {})
        assert rates_on(CUDA) == OURS  # all along in one process
    assert rates_on(CPU) == RATES[80]  # the interpreter's


def test_a_home_that_is_another_users_has_no_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **how: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.delenv(stored_rates.VARIABLE, raising=False)
    rates_on.cache_clear()
    with pretended_card(), monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert rates_on(CUDA) == RATES[90]
    rates_on.cache_clear()


def test_another_cards_rates_are_left_with_one_line(file: Path) -> None:
    store_rates(file, "another card", RATES[86], {})
    with pretended_card():
        with pytest.warns(UserWarning, match="of another card, none of") as told:
            assert rates_on(CUDA) == RATES[90]
        assert rates_on(CUDA) == RATES[90]  # and said once: here a warning is an error
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("rates/1", "rates/2"),
        lambda text: text.replace('"staged"', '"stagd"'),
        lambda text: text.replace('"gathered": 1.0', '"gathered": -1.0'),
        lambda text: text.replace('"gathered": 1.0', '"gathered": NaN'),
        lambda text: text.replace('"gathered": 1.0', '"gathered": true'),
        lambda text: text.replace('"tf32_gain": 6.0', '"tf32_gain": 0'),
        lambda text: text.replace('"narrow"', '"wide"'),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_file_is_refused_in_one_line(file: Path, damage: Callable[[str], str]) -> None:
    store_rates(file, CARD, OURS, {})
    whole = file.read_text()
    damaged = damage(whole)
    assert damaged != whole
    file.write_text(damaged, encoding="latin-1")
    with pretended_card(), pytest.raises(ValueError, match=r"rates\.json: no usable rates") as told:
        rates_on(CUDA)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="no usable rates"):
        store_of_user()  # before anything is measured
    with pytest.raises(ValueError, match="no usable rates"):
        store_rates(file, CARD, OURS, {})
    assert file.read_text(encoding="latin-1") == damaged


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stored_rates.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for home, folder in (
        ("", tmp_path / ".config"),
        ("relative", tmp_path / ".config"),
        (str(tmp_path / "xdg"), tmp_path / "xdg"),
    ):
        monkeypatch.setenv("XDG_CONFIG_HOME", home)
        assert stored_rates.rates_file() == folder / "spt_kernels" / "rates.json"
    rates_on.cache_clear()
    with pretended_card():
        assert rates_on(CUDA) == RATES[90]  # nothing is there, and nobody said so
    monkeypatch.setenv(stored_rates.VARIABLE, "")
    assert stored_rates.rates_file() is None
    with pytest.raises(ValueError, match="SPT_KERNELS_RATES: expected the file"):
        store_of_user()


def test_a_card_that_was_measured_has_rates_of_its_own(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(stored_rates.VARIABLE, "")
    with pretended_card():
        assert rates_on(CUDA) == RATES[90]
        rates_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
        assert rates_on(CUDA) == RATES_BY_NAME["NVIDIA H200"] != RATES[90]
        rates_on.cache_clear()
