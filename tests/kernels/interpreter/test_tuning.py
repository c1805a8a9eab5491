"""The tuner of launches visits what it says, and leaves every shipped configuration in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import tune_launches
from spt_kernels.kernels import sampled_tiles, squared_grad


def test_everything_runs_and_nothing_is_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squared_grad, "_LARGE_FROM_TILES", 0)
    before = copy.deepcopy((sampled_tiles.LAUNCHES, squared_grad._LARGE))
    calls = 0

    def count(run: Callable[[], object]) -> float:
        nonlocal calls
        calls += 1
        if calls % 5 == 1:  # the interpreter is slow
            run()
        if calls == 3:
            raise RuntimeError("out of shared memory")
        return float(calls)

    timings = list(
        tune_launches.everything(
            count, torch.device("cpu"), rows=130, columns=70, samples=2, tokens=20
        )
    )

    assert len(timings) == calls
    failed = [timing for timing in timings if timing.median_us is None]
    assert [timing.error for timing in failed] == ["RuntimeError: out of shared memory"]
    tuned = {timing.kernel for timing in timings if timing.launch}
    assert tuned == {"squares", "strips", "squared_grad"} or tuned == {"squares", "squared_grad"}
    for case in {(timing.kernel, timing.case) for timing in timings if timing.launch}:
        group = [t for t in timings if (t.kernel, t.case) == case]
        assert [t.shipped for t in group].count(True) == 1
        assert group[0].shipped, "the shipped one comes first"
        assert len({str(t.launch) for t in group}) == len(group) > 3
    assert before == (sampled_tiles.LAUNCHES, squared_grad._LARGE)


def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert tune_launches.main([]) == 0
    assert "nothing to tune" in capsys.readouterr().out
