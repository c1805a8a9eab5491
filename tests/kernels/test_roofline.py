"""The paper roofline adds up, and the examination shows what was found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import examine_kernels, measured_report
from bench.cards import CARDS
from bench.compilation import Compiled, Failure, Key
from bench.gradient_model import H100, staged_values, transposed_values, ways_us
from bench.machine_code import MachineCode
from bench.measured import H100_KERNELS, H100_STEPS
from bench.roofline_gpu import fc1, kernels, taken_way
from spt_kernels.gradient_ways.gradient_cost import Way


def test_nothing_is_expected_below_its_floor() -> None:
    for kernel in kernels():
        assert kernel.moved_bytes >= kernel.least_bytes
        for card in CARDS:
            assert 0 < kernel.floor_us(card) < kernel.expected_us(card)


def test_a_floor_by_hand() -> None:
    gelu = next(kernel for kernel in kernels() if "GELU" in kernel.name and "bf16" in kernel.name)
    a100 = next(card for card in CARDS if card.name.startswith("A100"))
    # 64 images of 197 tokens, 3,072 values of 2 bytes, read and written, at 2,039 GB/s
    assert gelu.floor_us(a100) == pytest.approx(64 * 197 * 3072 * 2 * 2 / 2039e9 * 1e6)


def test_nothing_was_measured_below_its_floor() -> None:
    for measured in H100_KERNELS:
        assert 0 < measured_report.kernel_floor_us(measured) < measured.us
    for step in H100_STEPS:
        assert 0 < measured_report.step_floor_ms(step) < step.ms


def test_a_calibrated_time_is_the_measured_one_on_its_own_card() -> None:
    for measured in H100_KERNELS:
        assert measured_report.kernel_us(measured, H100) == pytest.approx(measured.us)
    for step in H100_STEPS:
        assert measured_report.step_ms(step, H100) == pytest.approx(step.ms)
        for card in measured_report.OTHERS:
            assert measured_report.step_ms(step, card) > step.ms


def test_a_steps_floor_by_hand() -> None:
    # PyTorch counts 35.1 GFLOP in a forward of ViT-B/16, 0.23 of them in the patch embedding
    full = next(s for s in H100_STEPS if (s.method, s.dtype) == ("full", "fp32"))
    by_hand = 3 * 64 * (35.1e9 - 0.23e9) / 66.9e12 * 1e3
    assert measured_report.step_floor_ms(full) == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("itemsize", [2, 4], ids=["bf16", "fp32"])
def test_ways_of_the_sparse_weight_gradient(itemsize: int) -> None:
    gradient, plan = fc1(0.005, itemsize)
    assert plan.lists is not None
    # 64 rows and the columns that occur in them, from a copy of all 768 columns
    occurring = 768 * (1 - (1 - 0.005) ** 64)
    assert staged_values(plan) == pytest.approx(48 * (64 + occurring), rel=0.01)
    assert transposed_values(plan) == 768
    for card in CARDS:
        us = ways_us(card, gradient, plan)
        assert us[taken_way(card, gradient, plan)] <= us[Way.DENSE]
        assert min(us.values()) > gradient.read_bytes / card.memory_gb * 1e-3


def test_what_was_found_is_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = MachineCode(40, 0, {128: 4, 32: 2}, {128: 1}, 12, 0, 0, ("HMMA.16816.F32.BF16",))
    found: dict[Key, Compiled | Failure] = {
        ("sampled_tiles", "good", 90): Compiled(code, 1024, 3, "shared", 0.19),
        ("sampled_tiles", "bad", 90): Failure("CompilationError: no\nmore"),
    }
    monkeypatch.setattr(examine_kernels, "examine", lambda files, capabilities: found)
    path = tmp_path / "found.json"

    status = examine_kernels.main(["--arch", "sm_90", "--json", str(path), "sampled_tiles"])

    assert status == 1, "a variant did not compile"
    shown = capsys.readouterr().out
    assert "128 ×4, 32 ×2" in shown
    assert "HMMA.16816" in shown
    assert "19%" in shown
    assert "CompilationError: no" in shown
    good, bad = json.loads(path.read_text())["variants"]
    assert good["code"]["registers"] == 40
    assert bad["message"].startswith("CompilationError")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
def test_an_unknown_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        examine_kernels.main(["no_such_kernels"])
    assert "no_such_kernels" in capsys.readouterr().err
