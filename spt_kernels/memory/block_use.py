"""`BlockUse`: what each block of a model holds and computes in a rehearsed step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from .ledger import Ledger
from .work import Work, WorkCounter


@dataclass(frozen=True)
class BlockUse:
    """Of one block in one step.

    Attributes:
        kept_bytes: that its forward leaves behind, up to the next block.
        most_bytes: alive at once while it computes, forward or backward, beyond what was there
            before its forward. Of the last block, with all that comes after it.
        backward: what its backward computes; nothing where no gradient comes to it.
    """

    kept_bytes: int
    most_bytes: int
    backward: Work


class BlockWatch(contextlib.ExitStack):
    """While it is entered, notes when each block of a model begins and ends; then `use()` tells.

    Args:
        model: that takes one step meanwhile, with a backward.
        names: of its blocks, in the order in which they are called, each once.
        ledger: that books what it makes.
        counter: that counts what it computes.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], ledger: Ledger, counter: WorkCounter
    ) -> None:
        super().__init__()
        self._names, self._ledger, self._counter = names, ledger, counter
        self._places = {model.get_submodule(name): place for place, name in enumerate(names)}
        self._begun: list[tuple[int, int]] = []  # (block, moment), in the order of the forward
        self._arrived: dict[int, tuple[int, Work]] = {}  # gradients, of the outputs of blocks

    def __enter__(self) -> BlockWatch:
        self._since = self._ledger.moment()
        for module in self._places:
            self.callback(module.register_forward_pre_hook(self._begin, prepend=True).remove)
            self.callback(module.register_forward_hook(self._end).remove)
        return self

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._begun.append((self._places[module], self._ledger.moment()))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        place = self._places[module]

        def arrive(grad: Tensor) -> None:
            self._arrived.setdefault(place, (self._ledger.moment(), self._counter.work()))

        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(arrive)
                return

    def use(self) -> list[BlockUse]:
        """By block, in the order of the names.

        Raises:
            ValueError: the model does not call its blocks once each, one after the other.
        """
        # a forward that is computed again in the backward begins a second time
        begun = list(dict.fromkeys(place for place, _ in self._begun))
        if begun != list(range(len(self._names))):
            raise ValueError(
                "model: expected one that calls its blocks once each, in their order, got the "
                f"order {', '.join(self._names[place] for place in begun) or 'of none'}"
            )
        moments: dict[int, int] = {}
        for place, moment in self._begun:
            moments.setdefault(place, moment)
        curve = self._ledger.curve(self._since)

        def alive(moment: int) -> int:
            return curve[moment - self._since]

        def most(first: int, last: int) -> int:
            return max(curve[first - self._since : last - self._since + 1])

        end = self._since + len(curve) - 1
        turn = min((moment for moment, _ in self._arrived.values()), default=end)
        starts = [moments[place] for place in range(len(self._names))]
        stops = [*starts[1:], turn]
        used = []
        until, done = end, self._counter.work()
        for place, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            highest, backward = most(start, stop), Work()
            if place in self._arrived:
                moment, before = self._arrived[place]
                highest = max(highest, most(moment, until))
                backward = done - before
                until, done = moment, before
            kept = alive(stop) - alive(start)
            used.append(BlockUse(kept, highest - alive(start), backward))
        return used
