"""`Trials`: steps of one method in one precision that were rehearsed, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..memory import MemoryEstimate, Rehearsal, Work
from ..memory.batch import BatchesOf
from ..plan import Plan


@dataclass(frozen=True)
class Trial:
    """A rehearsed forward and backward of some images.

    Attributes:
        images: at a time.
        recompute: what the backward computed again, in `RecomputeWords`; empty for nothing.
        estimate: of its memory.
        work: that it did.
    """

    images: int
    recompute: str
    estimate: MemoryEstimate
    work: Work


class Trials:
    """Rehearses a step on a batch, or on a part of it, when it is first asked about.

    Args:
        model: plain or tuned already; not changed.
        image_shape: as for `largest_batch`.
        batch: images of an update.
        plan: as for `estimate_memory`, and so is `how`.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: Sequence[int] | Mapping[str, Tensor],
        batch: int,
        plan: Plan | None = None,
        **how: Any,
    ) -> None:
        batches = BatchesOf(image_shape, how.get("loss_fn"))
        self._batch = batches.of(batch)
        self._rehearsal = Rehearsal(model, plan, image_shape=batches.input, **how)
        self._known: dict[tuple[int, str], Trial] = {}
        self.parts = self._rehearsal.parts()

    def of(self, images: int, recompute: str = "") -> Trial:
        """The trial of so many images of the batch at a time.

        Raises:
            ValueError: the model cannot take so many, or has no such part.
            RuntimeError: it cannot compute that again.
        """
        asked = images, recompute
        if asked not in self._known:
            self._rehearsal.recompute(recompute)
            self._rehearsal.take_at_a_time(images)
            estimate, work = self._rehearsal.with_work(self._batch)
            self._known[asked] = Trial(images, recompute, estimate, work)
        return self._known[asked]
