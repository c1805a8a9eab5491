"""Accounted memory beside the resident memory of real steps on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from .contest import record
from .real_memory import STEPS_TO_RUN, THREADS, Comparison, compare


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_resident_memory(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    found: dict[str, Comparison] = {}

    def run_all() -> None:
        found.update(compare(STEPS_TO_RUN))

    benchmark.group = "memory accounting beside resident memory"
    benchmark.pedantic(run_all, rounds=1)
    facts = {f"{name}, MiB": str(comparison) for name, comparison in found.items()}
    with capsys.disabled():
        print("", *(f"  {name:<58}{fact}" for name, fact in facts.items()), sep="\n")
    title = f"peak of a step, resident on the CPU / accounted: fp32, {THREADS} threads"
    record(benchmark, title, facts)
