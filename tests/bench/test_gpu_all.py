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

# Answers the script's questions with exit codes, and runs no step but by its name
STAND_IN = """#!/usr/bin/env bash
case "$*" in
*is_available*) exit {no_card} ;;
*sm_%d%d*) echo sm_90 ;;
*bench_top_tau*) {top_tau} ;;
*tune_launches*) sleep {tuning_s} ;;
esac
"""


def run(tmp_path: Path, *arguments: str, budget_s: int = 600, **answers: object) -> dict[str, str]:
    """What became of each step."""
    python = tmp_path / "python"
    known = {"no_card": 0, "top_tau": "true", "tuning_s": 0} | answers
    python.write_text(STAND_IN.format(**known))
    python.chmod(0o755)
    result = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out"), *arguments],
        env=os.environ | {"PYTHON": str(python), "BUDGET_S": str(budget_s)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = result.stdout.splitlines()
    steps = {line[:32].strip(): line[32:61].strip() for line in lines if line.endswith(" s")}
    steps = {name: became for name, became in steps.items() if not name.startswith("results in")}
    return steps | {"exit": str(result.returncode)}


def test_without_a_card_every_step_is_named_and_skipped(tmp_path: Path) -> None:
    steps = run(tmp_path, no_card=1)
    assert steps.pop("exit") == "0"
    assert len(steps) > 10
    assert set(steps.values()) == {"skipped: no CUDA device"}
    assert not list((tmp_path / "out" / "done").iterdir())


def test_a_second_run_repeats_only_what_failed(tmp_path: Path) -> None:
    first = run(tmp_path, top_tau="exit 3")
    assert first.pop("exit") == "1"
    assert first.pop("bench-top-tau") == "failed (3)"
    assert set(first.values()) == {"ok"}

    second = run(tmp_path)
    assert second.pop("exit") == "0"
    assert second.pop("bench-top-tau") == "ok"
    assert set(second.values()) == {"skipped: done before"}

    again = run(tmp_path, "--again")
    assert again.pop("exit") == "0"
    assert set(again.values()) == {"ok"}


def test_time_is_limited(tmp_path: Path) -> None:
    steps = run(tmp_path, budget_s=4, tuning_s=60)
    assert steps.pop("exit") == "1"
    assert steps["tests-kernels"] == "ok"
    assert steps["ways-and-launches"] == "out of time"
    assert steps["examine"] == "skipped: no time left"


def test_a_python_without_the_package_is_named(tmp_path: Path) -> None:
    result = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out")],
        env=os.environ | {"PYTHON": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "set PYTHON" in result.stderr
