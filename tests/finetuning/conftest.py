"""What these tests share: one thread, as the models are too small for two; a task and its base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_kernels.finetuning import ImageSource, ModelSource
from spt_kernels.finetuning.demo import one_thread

from .pictures_on_disk import write_task, write_weights
from .undrawn import draw_nothing


@pytest.fixture(scope="package", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def task(place: Path) -> ImageSource:
    return ImageSource(str(write_task(place / "data")))


@pytest.fixture(scope="module")
def base(place: Path) -> ModelSource:
    return write_weights(place / "base.safetensors")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)
