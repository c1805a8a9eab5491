"""A recipe of a few iterations, and a listener that ends a run where it is told to."""

from __future__ import annotations

from spt_kernels.finetuning.progress import Silent
from spt_kernels.segmentation import SegmentationRecipe
from tests.finetuning.killed import Killed

SHORT = SegmentationRecipe(iterations=7, batch_size=3, drop_path=0.2)


class Dying(Silent):
    """Dies at the n-th step of a stage."""

    def __init__(self, stage: str, steps: int, of: type[BaseException] = Killed) -> None:
        self.stage, self.steps, self.of, self.now = stage, steps, of, ""

    def start(self, stage: str, total: int) -> None:
        self.now, self.done = stage, 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        if self.now == self.stage and self.done >= self.steps:
            raise self.of
