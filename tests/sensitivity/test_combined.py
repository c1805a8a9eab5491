"""What several processes have found of one model, as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spt_kernels.model import guess
from spt_kernels.sensitivity.shared import _combined_info

CALLED = guess("norm.weight", (4,))
READ = replace(CALLED, reads=True)


@pytest.mark.parametrize(
    ("found", "idle", "expected"),
    [
        ((CALLED, READ), (), READ),
        ((READ, CALLED), (), READ),
        ((READ, CALLED), (0,), CALLED),  # never called there, as no sample uses it
        ((CALLED, READ), (1,), CALLED),
        ((READ, READ), (0, 1), READ),
    ],
)
def test_who_reads_a_parameter_is_believed(found, idle, expected) -> None:
    name = "norm.weight"
    parts = [
        {"info": {name: info}, "idle": (name,) if rank in idle else ()}
        for rank, info in enumerate(found)
    ]
    assert _combined_info(name, parts) == expected
