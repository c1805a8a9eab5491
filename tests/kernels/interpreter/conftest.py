"""Keeps these tests to a process of their own: Triton decides at import how its kernels run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(
        reason="needs its own process: TRITON_INTERPRET=1 pytest tests/kernels/interpreter"
    )
    for item in items:  # a conftest sees the items of the whole session
        if _HERE in item.path.parents:
            item.add_marker(skip)
