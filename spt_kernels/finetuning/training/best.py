"""`BestSoFar`: what was trained at the best look at validation images, and whether to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...methods.tunable import Tunable
from ..folder.checkpoint import Best, Checkpoint, put_state
from ..folder.run_folder import RunFolder

Rank = tuple[float, ...]  # by which looks are compared, the best the highest


@dataclass
class BestSoFar:
    """Compares looks at validation images, each after so many epochs or iterations.

    Attributes:
        best: when the best of the looks was, among equals the first, and what was trained by then;
            `None` before any.
    """

    best: Best | None = None
    _rank: Rank = field(default=(), init=False)
    _looked: int = field(default=0, init=False)

    def go_on(self, state: Checkpoint, ranks: Mapping[int, Rank]) -> None:
        """Be as it was when a checkpoint was taken.

        Args:
            state: the checkpoint.
            ranks: of each look before it, by when that was.
        """
        self._looked = max(ranks, default=0)
        if state.best is None or state.best_epoch is None:
            return
        self._rank = ranks[state.best_epoch]
        self.best = Best(state.best_epoch, state.best)

    def look(self, done: int, rank: Rank, model: nn.Module) -> None:
        """Note a look after `done` epochs or iterations."""
        self._looked = done
        if self.best is None or rank > self._rank:
            self._rank = rank
            self.best = Best.take(done, model)

    def is_over(self, patience: int | None) -> bool:
        """Whether so many have not been better than the best before them; `None` for never."""
        if patience is None or self.best is None:
            return False
        return self._looked - self.best.epoch >= patience

    def last_words(self, patience: int | None, unit: str) -> str:
        """Why training stopped, counted in epochs or iterations, as a line."""
        assert self.best is not None
        return f"stopped: none of {patience:,} {unit}s was better than {unit} {self.best.epoch:,}"


def save_best(
    tunable: Tunable,
    folder: RunFolder,
    best: Best | None,
    last: int,
    described: dict[str, Any],
) -> str | None:
    """Write what was trained at its best beside what is the last; its name, `None` if they are one.

    Args:
        tunable: as it is in the end, and is left.
        folder: of the run.
        best: after how many epochs or iterations, and what.
        last: after how many of them it ended.
        described: what the file tells of itself.
    """
    path = folder[f"best_{tunable.file}"]
    if best is None or best.epoch == last:
        path.unlink(missing_ok=True)  # of a run that was shorter
        return None
    end = Best.take(last, tunable.model)
    put_state(tunable.model, best.tensors)
    tunable.save(path, described)
    put_state(tunable.model, end.tensors)
    return path.name
