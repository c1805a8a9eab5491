"""One thread: the models are too small to gain from two, and lose much on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spt_kernels.finetuning.demo import one_thread


@pytest.fixture(scope="package", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield
