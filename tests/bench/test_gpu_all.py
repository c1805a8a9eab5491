"""`bench/gpu_all.sh` skips, times out, fails and resumes visibly, with a stand-in for Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_all.sh"

if shutil.which("bash") is None or shutil.which("timeout") is None:
    pytest.skip("bash and timeout (GNU coreutils) are needed", allow_module_level=True)

# Answers the script's questions with exit codes, and runs no part but by its name
STAND_IN = """#!/usr/bin/env bash
case "$*" in
*is_available*) exit {no_card} ;;
*sm_%d%d*) echo sm_90 ;;
*bench_top_tau*) {top_tau} ;;
*step_profiles*bf16-autocast*) sleep {profile_s} ;;
esac
"""
CALLS = ("first", "second", "rest")


def run(
    tmp_path: Path, *arguments: str, budget_s: int = 600, device: str = "cuda", **answers: object
) -> tuple[dict[str, str], str]:
    """What became of each part and of the script, as `exit`; and its last words."""
    python = tmp_path / "python"
    known = {"no_card": 0, "top_tau": "true", "profile_s": 0} | answers
    python.write_text(STAND_IN.format(**known))
    python.chmod(0o755)
    call, *others = arguments
    more = {"PYTHON": str(python), "BUDGET_S": str(budget_s), "DEVICE": device}
    result = subprocess.run(
        [str(SCRIPT), call, str(tmp_path / "out"), *others],
        env=os.environ | more,
        capture_output=True,
        text=True,
        check=False,
    )
    lines, _, summary = result.stdout.partition("\n\n")
    parts = {line[:32].strip(): line[32:61].strip() for line in lines.splitlines()}
    return parts | {"exit": str(result.returncode)}, summary


@pytest.mark.parametrize("call", CALLS)
def test_without_a_card_every_part_is_named_and_skipped(tmp_path: Path, call: str) -> None:
    parts, summary = run(tmp_path, call, no_card=1)
    assert parts.pop("exit") == "0"
    assert len(parts) >= 3
    assert set(parts.values()) == {"skipped: no CUDA device"}
    assert not list((tmp_path / "out" / "done").iterdir())
    assert "skipped:" in summary


@pytest.mark.parametrize("call", CALLS)
def test_on_a_cpu_it_can_be_tried(tmp_path: Path, call: str) -> None:
    parts, _ = run(tmp_path, call, no_card=1, device="cpu")
    assert parts.pop("exit") == "0"
    assert len(parts) >= 3
    assert set(parts.values()) == {"ok"}


def test_a_second_run_repeats_only_what_failed(tmp_path: Path) -> None:
    first, summary = run(tmp_path, "first", top_tau="exit 3")
    assert first.pop("exit") == "1"
    assert first.pop("bench-top-tau") == "failed (3)"
    assert set(first.values()) == {"ok"}
    assert ["failed:", "bench-top-tau"] in [line.split() for line in summary.splitlines()]

    second, _ = run(tmp_path, "first")
    assert second.pop("exit") == "0"
    assert second.pop("bench-top-tau") == "ok"
    assert set(second.values()) == {"skipped: done before"}

    other, _ = run(tmp_path, "second")
    assert set(other.values()) == {"ok", "0"}
    again, _ = run(tmp_path, "first", "--again")
    assert again.pop("exit") == "0"
    assert set(again.values()) == {"ok"}


def test_time_is_limited(tmp_path: Path) -> None:
    parts, summary = run(tmp_path, "first", budget_s=4, profile_s=60)
    assert parts.pop("exit") == "1"
    assert parts["install"] == "ok"
    assert parts["profiles-autocast-64"] == "out of time"
    assert parts["bench-swap"] == "not begun: no time left"
    lines = [line.partition(":") for line in summary.splitlines()[1:]]
    told = {result.strip(): names.split() for result, _, names in lines}
    assert told["ok"] == ["install"]
    assert told["out of time"] == ["profiles-autocast-64"]
    assert len(told["not begun"]) == len(parts) - 2


@pytest.mark.parametrize(
    ("call", "words"), [("first", "set PYTHON"), ("third", "gpu_all.sh first")]
)
def test_what_cannot_be_is_told(tmp_path: Path, call: str, words: str) -> None:
    result = subprocess.run(
        [str(SCRIPT), call, str(tmp_path / "out")],
        env=os.environ | {"PYTHON": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert words in result.stderr
