from __future__ import annotations

import pytest

from spt_kernels.benchmarks import BenchmarkTask
from spt_kernels.finetuning import ImageSource


def test_no_task_chooses_with_its_test_images() -> None:
    images = ImageSource("photos", train_list="train.txt", test_list="test.txt")
    with pytest.raises(ValueError, match="choose: task 'birds' would choose with its test images"):
        BenchmarkTask("birds", "Birds", "Natural", choose=images, final=images)
