"""What these tests share: a tiny model, two groups of tiny tasks, and runs that draw nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_kernels.benchmarks import BenchmarkSetting, BenchmarkTask, folder_tasks
from spt_kernels.finetuning import Method, ModelSource, Recipe
from spt_kernels.finetuning.demo import one_thread
from tests.finetuning.pictures_on_disk import write_task, write_weights
from tests.finetuning.undrawn import draw_nothing

METHODS = (Method("linear"), Method("spt-unstructured", 400, samples=12))


@pytest.fixture(scope="package", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="package", autouse=True)
def quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        yield


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="package")
def base(place: Path) -> ModelSource:
    return write_weights(place / "base.safetensors")


@pytest.fixture(scope="package")
def tasks(place: Path) -> tuple[BenchmarkTask, ...]:
    write_task(place / "suite" / "Near" / "reds", train=6, test=3)
    write_task(place / "suite" / "Far" / "blues", train=5, test=4)
    return folder_tasks(place / "suite")


@pytest.fixture(scope="package")
def setting(base: ModelSource, tasks: tuple[BenchmarkTask, ...]) -> BenchmarkSetting:
    recipe = Recipe(epochs=1, batch_size=8, lr=1e-2)
    return BenchmarkSetting("Suite", base, tasks, METHODS, (0, 1), recipe)
