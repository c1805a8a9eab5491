"""Keeps these tests to a process of their own: Triton decides at import how its kernels run."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture(autouse=True, scope="session")
def language_prepared_once_a_launch() -> Iterator[None]:
    """A third of the time: Triton goes through all of its language in each call of a function.

    It does so for a launch, and puts all back after it; but a device function within it does so
    again, around what is in place already.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_LangPatchScope"):  # older ones do it otherwise
            patch.setattr(interpreter, "_patch_lang", _Prepared(interpreter._patch_lang))
        yield


class _Prepared:
    """The interpreter's `_patch_lang`, which leaves alone what the launch has prepared."""

    def __init__(self, prepare: Callable[[Any], Any]) -> None:
        self._prepare = prepare
        self._ready: list[ModuleType] = []

    def __call__(self, fn: Any) -> Any:
        wanted = [value for value in fn.__globals__.values() if _is_language(value)]
        if all(any(value is ready for ready in self._ready) for value in wanted):
            return None  # a device function's: nobody restores it
        scope = self._prepare(fn)
        self._ready += wanted
        restore = scope.restore

        def restore_all() -> None:
            self._ready.clear()
            restore()

        scope.restore = restore_all
        return scope


def _is_language(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith("triton.language")
