"""Keeps these tests to a process of their own: Triton decides at import how its kernels run."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import pytest

_HERE = Path(__file__).parent


def _why_not() -> str:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs its own process: TRITON_INTERPRET=1 pytest tests/kernels/interpreter"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    triton = tuple(map(int, version.split(".")[:2]))
    numpy = tuple(map(int, np.__version__.split(".")[:2]))
    if triton < (3, 7) and numpy >= (2, 4):
        # it calls int() on arrays of one element for a loop's bounds, which NumPy stopped allowing
        return "the interpreter of Triton < 3.7 cannot run loops with NumPy ≥ 2.4"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if why_not := _why_not():
        for item in items:  # a conftest sees the items of the whole session
            if _HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=why_not))
