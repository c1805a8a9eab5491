"""What is fetched ahead of its use, and given back when a pass is over: order across blocks."""

from __future__ import annotations

import functools
from typing import Any, Protocol

from ..ops.torch_internals import current_graph_task, queue_callback


class Block(Protocol):
    """What a schedule needs of a `StreamedBlock`.

    Attributes:
        has_backward: whether autograd follows its last forward.
    """

    has_backward: bool

    def fetch_ahead(self) -> bool:
        """Begin to fetch what the next call will need; False if one has it already."""
        ...

    def give_up(self) -> None:
        """Give the memory back unless a call needs it."""
        ...

    def end_interrupted(self) -> None:
        """Forwards that Ctrl-C has ended need the values no more."""
        ...


class BlockCall(Protocol):
    """One call of a block, whose backward may be running."""

    @property
    def block(self) -> Block:
        """Of which it is a call."""
        ...

    def end_backward(self) -> None:
        """Nothing reads the weights any more."""
        ...


class Schedule:
    """The blocks of a model in the order in which they were first called.

    Args:
        ahead: how many blocks are fetched ahead of the one that computes.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._order: list[Block] = []
        self._place: dict[Block, int] = {}
        self._fetched: list[Block] = []  # ahead, and not used yet
        self._resting: Block | None = None  # kept from its forward for its backward
        self._entered: dict[
            int, list[BlockCall]
        ] = {}  # number of a backward -> the calls it has reached

    def begin_model(self, *_: Any) -> None:
        """A hook before the model: the first block comes while what is before it computes."""
        if in_backward():
            return
        for block in self._order:
            block.end_interrupted()
        self.end_leftovers()
        if self._ahead:
            self._fetch_ahead(self._order[:1])

    def end_model(self, *_: Any) -> None:
        """A hook after the model: what came for a block that was not called goes again."""
        if not in_backward():
            self._fetch_ahead([])

    def begin_forward(self, block: Block) -> None:
        """A block is about to run, and is there."""
        if block not in self._place:
            self._place[block] = len(self._order)
            self._order.append(block)
        if in_backward():
            return  # made again for it: what comes next is not known
        after = self._place[block] + 1
        self._used(block)
        self._fetch_ahead(self._order[after : after + self._ahead])

    def end_forward(self, block: Block, *, has_backward: bool) -> bool:
        """Whether a block that has run stays there, as its backward comes next."""
        if not has_backward:
            return False
        if in_backward():
            self._entered.setdefault(self._task(), [])  # given back when that is over
            return True
        if self._place[block] + 1 < len(self._order):
            return False
        self._resting = block
        return True

    def begin_backward(self, call: BlockCall) -> None:
        """The backward of a call is about to run, and its block is there."""
        self._entered.setdefault(self._task(), []).append(call)
        self._used(call.block)
        place = self._place[call.block]
        before = reversed(self._order[max(0, place - self._ahead) : place])
        self._fetch_ahead([block for block in before if block.has_backward])

    def end(self) -> None:
        """Let go of all blocks, which have this: their memory is not to wait for the collector."""
        self._entered.clear()
        self._place.clear()
        self._order, self._fetched, self._resting = [], [], None

    def _task(self) -> int:
        """The number of the backward that is running, the end of which is told from then on."""
        task: int = current_graph_task()
        if task not in self._entered:
            queue_callback(functools.partial(self._end_backward, task))
        return task

    def _end_backward(self, task: int) -> None:
        for call in self._entered.pop(task, ()):
            call.end_backward()
        if not self._entered:
            self._fetched, self._resting = [], None
            for block in self._order:
                block.give_up()

    def end_leftovers(self, but: Block | None = None) -> None:
        """Before a forward: nothing is needed of a backward that has failed, or never came."""
        if in_backward():
            return
        for task in list(self._entered):
            self._end_backward(task)
        if self._resting is not None and self._resting is not but:
            self._resting.give_up()
            self._resting = None

    def _used(self, block: Block) -> None:
        self._fetched = [other for other in self._fetched if other is not block]

    def _fetch_ahead(self, blocks: list[Block]) -> None:
        for block in self._fetched:
            if block not in blocks:
                block.give_up()
        self._fetched = [block for block in blocks if block.fetch_ahead()]


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return bool(current_graph_task() != -1)
