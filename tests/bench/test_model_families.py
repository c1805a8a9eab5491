"""The walk through timm's families: what a family came to, whatever became of its process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench import model_walk
from bench.model_families import page, walked


def works(_family: str, tell: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    tell({"stage": "measuring"})
    return {"model": "vit", "image": 64}


def fails(_family: str, tell: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    tell({"stage": "measuring", "model": "vit"})
    raise ValueError("no candidates:\nnone at all")


def hangs(_family: str, tell: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    tell({"stage": "measuring", "model": "vit"})
    time.sleep(60)
    return {}


def dies(_family: str, tell: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    tell({"stage": "measuring", "model": "vit"})
    os._exit(9)


@pytest.mark.parametrize(
    ("walk", "limit_s", "expected"),
    [
        (works, 60, {"model": "vit", "image": 64}),
        (fails, 60, {"model": "vit", "stage": "measuring", "reason": "ValueError: no candidates:"}),
        (hangs, 0.5, {"model": "vit", "stage": "measuring", "reason": "not done after 0 s"}),
        (dies, 60, {"model": "vit", "stage": "measuring", "reason": "the process ended with 9"}),
    ],
    ids=["works", "fails", "hangs", "dies"],
)
def test_a_family_is_told_whatever_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch,
    walk: Callable[..., dict[str, Any]],
    limit_s: float,
    expected: dict[str, Any],
) -> None:
    monkeypatch.setattr(model_walk, "walk", walk)
    row = walked("family", limit_s)
    assert set(row.pop("versions")) == {"spt_kernels", "torch", "timm"}
    assert row == expected


def test_a_walk_goes_to_a_loaded_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_walk, "smallest", lambda _: ("test_vit", 365_000))
    stages: list[str] = []
    row = model_walk.walk("family", lambda told: stages.append(told["stage"]))
    assert stages[-1] == "saving and loading the task"
    assert 0 < row["trained"] <= 0.005 * row["backbone"]
    assert row["image"] >= 64
    assert row["one_by_one"] == 0


def test_the_page_parts_what_works_from_what_does_not() -> None:
    row = {"model": "vit_s", "image": 64, "parameters": 5_000_000, "versions": {"torch": "9"}}
    good = {"candidates": 90, "backbone": 100, "structured": 7, "unstructured": 30, "one_by_one": 0}
    rows = {"a": {**row, **good}, "b": {**row, "stage": "measuring", "reason": "x | y"}}
    text = page(rows, ["a", "b", "c"])
    assert "1 of 2 families work (torch 9)." in text
    assert "| a | `vit_s` | 64² | 5.0 M | 90 % | 7 | 30 | none |" in text
    assert "| b | vit_s | measuring | x \\| y |" in text
    assert text.endswith("## Not walked through yet\n\nc\n")
