"""How long a computation takes is told in a unit that one reads."""

from __future__ import annotations

from spt_kernels.finetuning.progress import duration


def test_a_duration_is_of_a_unit_that_fits() -> None:
    told = [duration(seconds) for seconds in (0.4, 89, 90, 5399, 5400, 458_000)]
    assert told == ["0 s", "89 s", "2 min", "90 min", "1.5 h", "127.2 h"]
