"""The paper roofline adds up, and the examination shows what was found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import examine_kernels
from bench.cards import CARDS
from bench.compilation import Compiled, Failure, Key
from bench.gradient_model import staged_values, transposed_values, ways_us
from bench.machine_code import MachineCode
from bench.roofline_gpu import fc1, kernels, taken_way
from spt_kernels.kernels.gradient_cost import Way


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
    code = MachineCode(40, 0, {128: 4, 32: 2}, {128: 1}, 12, 0, ("HMMA.16816.F32.BF16",))
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
