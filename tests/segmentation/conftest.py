"""What these tests share: one thread, as the models are too small for two; scenes, base, job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_kernels.finetuning import Method
from spt_kernels.finetuning.base.models import ModelSource
from spt_kernels.finetuning.demo import one_thread
from spt_kernels.segmentation import SegmentationJob, pipeline
from tests.finetuning.undrawn import draw_nothing

from .scenes_on_disk import write_backbone, write_scenes
from .short_runs import SHORT


@pytest.fixture(scope="package", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures and accounted memory, which take longer than runs of a few iterations."""
    draw_nothing(monkeypatch, pipeline)


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "ADEChallengeData2016")


@pytest.fixture(scope="package")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return write_backbone(tmp_path_factory.mktemp("base") / "vit.safetensors")


@pytest.fixture(scope="package")
def job(data: Path, backbone: ModelSource) -> SegmentationJob:
    method = Method("spt-lora", 1500, 2, 5)
    return SegmentationJob(backbone, str(data), method, SHORT, size=32, channels=8)
