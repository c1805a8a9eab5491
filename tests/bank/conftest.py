"""Files of a few tasks of one base, and what their models say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .tasks import images, loaded, task_files


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return task_files(tmp_path)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What each task says of two images, by itself."""
    files = task_files(tmp_path_factory.mktemp("tasks"))
    with torch.no_grad():
        return {task: loaded("vit", path)(images("vit", 2)) for task, path in files.items()}
