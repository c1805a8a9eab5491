"""What these tests share: one thread, as the models are too small for two; scenes and a base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_kernels.finetuning.demo import one_thread
from spt_kernels.finetuning.models import ModelSource

from .scenes_on_disk import write_backbone, write_scenes


@pytest.fixture(scope="package", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "ADEChallengeData2016")


@pytest.fixture(scope="package")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return write_backbone(tmp_path_factory.mktemp("base") / "vit.safetensors")
