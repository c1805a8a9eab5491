"""The checks of `make soak`, a few times each; and that they see what they look for."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from bench.soak import damaged_files, fuzz, kills, switches, threads
from bench.soak.__main__ import CHECKS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@pytest.mark.parametrize(
    ("check", "count"),
    [
        (damaged_files.check, 60),
        (kills.check, 4),
        (fuzz.check, 12),
        (switches.check, 20),
        (threads.check, 1),
    ],
    ids=["files", "saving", "ops", "switches", "threads"],
)
def test_nothing_is_found(check: Callable[[int, int], str], count: int) -> None:
    assert check(count, 1)
    assert any(check is own for own, _, _ in CHECKS.values())


def test_a_file_that_is_accepted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damaged_files, "read", lambda _: None)
    with pytest.raises(AssertionError, match=r"it was accepted; the file is .*\.safetensors"):
        damaged_files.check(5, 0)


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fuzz.sparse_weight_grad
    monkeypatch.setattr(fuzz, "sparse_weight_grad", lambda *a: right(*a) * 1.001)
    with pytest.raises(AssertionError, match=r"sparse_weight_grad, call .* of seed 0"):
        fuzz.check(20, 0)
    monkeypatch.setattr(fuzz, "sparse_weight_grad", right)
    monkeypatch.setattr(fuzz, "top_tau", lambda t, k, c: [torch.zeros(0).long() for _ in t])
    with pytest.raises(AssertionError, match="other positions"):
        fuzz.check(20, 0)


def test_another_task_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches.spt, "load_delta", lambda model, _: model)
    with pytest.raises(AssertionError, match="gave what it does not give alone"):
        switches.check(20, 0)
