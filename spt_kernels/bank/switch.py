"""One task on the base, then another: what has to be written is, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..model.replaced_head import ReplacedHead, fit_head, name_classes, restore_head
from ..ops.write_delta import write_delta
from ..task.forward_state import set_buffers
from .banked_task import BankedTask
from .base import Base
from .structured import group_of_one
from .structured_class import plain_again, put_on


@dataclass
class Switch:
    """Which task a base model has on; mutable.

    Attributes:
        base: the model.
        task: the one that is on; None for the base itself, or where `leaving` is not done.
        leaving: one that is on in part, which the next switch takes off; None else.
    """

    base: Base
    task: BankedTask | None = None
    leaving: BankedTask | None = None
    _replaced: ReplacedHead = field(default_factory=ReplacedHead)

    @torch.inference_mode(False)
    @torch.no_grad()
    def to(self, task: BankedTask | None) -> None:
        """Put a task on in place of the one that is; None leaves the base, bit for bit.

        Raises:
            ValueError: somebody else has changed the model.
        """
        if task is self.task and self.leaving is None:
            return
        self.base.check_unchanged()
        try:
            self._leave(task)
            if task is not None:
                self._enter(task)
        finally:
            self.base.forget_kept()
            self.base.record()

    def _leave(self, following: BankedTask | None) -> None:
        """Take off what is on, to put the following task on."""
        task = self.leaving or self.task
        if task is not None:
            self.task, self.leaving = None, task  # all of what follows may be done again
            self._take_off(task, following)
        self.leaving = following

    def _take_off(self, task: BankedTask, following: BankedTask | None) -> None:
        """The base again, but for what the following task writes anyway."""
        for name in task.structured:
            plain_again(self.base.modules[name.rpartition(".")[0]])
        write_entries(self.base, task, _differing(task, following), restore=True)
        restore_head(self.base.model, self._replaced)
        self._replaced = ReplacedHead()
        for name in task.whole.keys() & self.base.now.parameters.keys():
            if name.rpartition(".")[0] not in task.replaced:
                self.base.now.parameters[name].copy_(self.base.whole(name))
        set_buffers(self.base.now, self.base.buffers(task.buffers))

    def _enter(self, task: BankedTask) -> None:
        try:
            self._put(task)
        except BaseException:
            self._leave(None)
            raise
        self.task, self.leaving = task, None

    def _put(self, task: BankedTask) -> None:
        base, model = self.base, self.base.model
        write_entries(base, task, task.sparse, restore=False)
        head = {name: task.whole[name] for name in task.head}
        self._replaced = fit_head(model, head, task.elsewhere)
        if self._replaced.modules or task.classes:  # which takes a walk over all modules
            self._replaced = name_classes(model, self._replaced, head, task.classes)
        for name, values in task.whole.items():
            target = base.now.parameters.get(name)
            if target is None or name.rpartition(".")[0] in task.replaced:
                target = model.get_parameter(name)
            target.copy_(values)
        set_buffers(base.now, task.buffers)
        for name, part in task.structured.items():
            put_on(base.modules[name.rpartition(".")[0]], group_of_one(part))


def write_entries(base: Base, task: BankedTask, names: Iterable[str], *, restore: bool) -> None:
    """Write the trained entries of some parameters, or their base values, in one launch."""
    parts = [(base.now.parameters[name], task.sparse[name]) for name in names]
    values = [part.positions.base if restore else part.tuned for _, part in parts]
    indices = [part.positions.index for _, part in parts]
    write_delta([parameter for parameter, _ in parts], indices, values, None)


def _differing(task: BankedTask, following: BankedTask | None) -> list[str]:
    """Parameters whose entries the following task does not write over, all of them."""
    if following is None:
        return list(task.sparse)
    after = following.sparse
    return [
        name
        for name, part in task.sparse.items()
        if name not in after or after[name].positions is not part.positions
    ]
