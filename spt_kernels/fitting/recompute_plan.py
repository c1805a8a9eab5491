"""`recompute`: parts of blocks by name, or those that bring a step into a memory at least cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from .. import recomputation
from ..memory import BlockUse, MemoryEstimate, Rehearsal
from ..memory.batch import batch_form, input_of, shape_of
from ..plan.within import check_bytes
from ..recomputation import Recomputation, RecomputeWords
from ..recomputation.choice import What
from ..recomputation.conditions import NotRecomputable, WritesCache
from .card import Card, card_of
from .least_time import BlockLevel, least_room, least_time
from .levels import levels_of

_TRIES = 6  # a plan that does not fit after all is made anew for as much less room


@dataclass(frozen=True)
class RecomputePlan(Recomputation):
    """What was chosen so that a step fits, and at which price.

    Attributes:
        memory_bytes: that the step was to fit in.
        peak_bytes: of a step, accounted with all of it in place.
        plain_peak_bytes: of one that computes nothing again.
        saved_bytes: of each block, that its forward leaves behind the less.
        added_seconds: of each block, that its backward takes the longer, by the card's figures.
        card: the name of that card.
    """

    memory_bytes: int
    peak_bytes: int
    plain_peak_bytes: int
    saved_bytes: Mapping[str, int]
    added_seconds: Mapping[str, float]
    card: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("saved_bytes", "added_seconds"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def summary(self) -> str:
        """A text table: of each block what is computed again, MiB saved and milliseconds added."""
        width = max([len("in all"), *map(len, self.blocks)])
        lines = [
            f"{'block':<{width}}  {'computed again':<17}{'MiB saved':>10}{'ms added':>10}",
            *(
                f"{block:<{width}}  {' and '.join(options) or 'nothing':<17}"
                f"{self.saved_bytes[block] / 2**20:>10,.1f}"
                f"{1e3 * self.added_seconds[block]:>10.2f}"
                for block, options in self.blocks.items()
            ),
            f"{'in all':<{width}}  {'':<17}{sum(self.saved_bytes.values()) / 2**20:>10,.1f}"
            f"{1e3 * sum(self.added_seconds.values()):>10.2f}",
            f"peak {self.peak_bytes / 2**20:,.0f} MiB of {self.memory_bytes / 2**20:,.0f}, "
            f"{self.plain_peak_bytes / 2**20:,.0f} without (accounted; times by the figures of "
            f"the {self.card}, not measured)",
        ]
        return "\n".join(lines)


def recompute(
    model: nn.Module,
    what: What | None = None,
    *,
    memory_bytes: int | float | None = None,
    batch_shape: Sequence[int] | Mapping[str, Tensor] | None = None,
    card: str | None = None,
    on_rehearsal: Callable[[], object] = lambda: None,
    **how: Any,
) -> Recomputation:
    """Let the backward compute parts of a model's blocks again instead of keeping them, exactly.

        spt.recompute(model, "mlp")                       # all blocks
        spt.recompute(model, ("mlp", "qkv"))
        spt.recompute(model, {"blocks.0": "block", "blocks.1": "mlp"})
        spt.recompute(model, memory_bytes=4 * 2**30, batch_shape=(64, 3, 224, 224))
        spt.recompute(model, "nothing")                   # and off again

    Gradients are the same to the bit. The model's forward, parameters, `state_dict` and inference
    stay as they are; it may be tuned, merged, copied and saved with or without this. Where no
    gradient is asked for nothing is done. Dropout draws the same numbers again.

    What each keeps of a block, and makes of it in the backward:

    - `"mlp"`: the MLP from the norm before it: the hidden activations, one matrix product.
    - `"qkv"`: the attention up to `F.scaled_dot_product_attention`: q, k and v, one product. The
      attention itself, its result and its statistics are kept.
    - `"attention"`: all of the attention module.
    - `"block"`: everything; the block's input is kept.

    The last product of a region is not computed again where nothing in it is needed. A norm before
    an MLP or attention is made again from its input, if its result is what that is called with.

    With `memory_bytes`, each block gets what makes a step fit in the least time: the step is
    rehearsed at every level (without a card and without arithmetic, as `estimate_memory` does),
    which tells what each block keeps, needs and computes; the best choice follows exactly, and is
    rehearsed again before it is taken.

    Args:
        model: plain, or tuned by this package or another; not compiled.
        what: one option or several for all blocks that have such a part; or, by the name of a
            block, for these blocks alone; `"nothing"` or an empty sequence for no block. It takes
            the place of what was chosen before.
        memory_bytes: that a step's accounted peak may have, in place of `what`.
        batch_shape: then, of the step's input, or a batch that is a mapping, as `estimate_memory`
            has it.
        card: then, by whose figures times are told; one of `spt_kernels.fitting.CARDS`. Left out,
            it is the card at hand, or an RTX 3060.
        on_rehearsal: then, called before each rehearsal, for who shows progress.
        how: then, the other arguments of `estimate_memory`: `dtype`, `loss_fn`, …

    Returns:
        What was chosen for each block; for `memory_bytes` a `RecomputePlan`.

    Raises:
        TypeError: an argument of another type.
        ValueError: an option or block that there is not, a block that has no such part, or a model
            whose names tell no blocks; no choice fits. The model is then as it was.
    """
    if memory_bytes is None:
        if what is None:
            raise TypeError("what: expected an option, several or a mapping, or memory_bytes")
        for name, value in (("batch_shape", batch_shape), ("card", card), *how.items()):
            if value is not None:
                raise TypeError(f"{name}: is for memory_bytes, which was not given")
        return recomputation.recompute(model, what)
    if what is not None:
        raise TypeError(f"what: memory_bytes chooses it, got {what!r} as well")
    check_bytes(memory_bytes)
    if batch_shape is None:
        raise TypeError("batch_shape: memory_bytes needs the shape of a step's input")
    levels = Levels(model, batch_shape, card_of(card), on_rehearsal, **how)
    plan = levels.plan(int(memory_bytes))
    recomputation.recompute(model, plan.blocks)
    return plan


class Levels:
    """A step rehearsed at every level, of which a plan for any memory follows.

    Args:
        model: plain or tuned; not changed.
        batch_shape: of the step's input, or a batch that is a mapping.
        card: whose figures tell times.
        on_rehearsal: called before each rehearsal.
        how: as for `estimate_memory`.

    Raises:
        ValueError: the model has no blocks, or calls them in another order.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_shape: Sequence[int] | Mapping[str, Tensor],
        card: Card,
        on_rehearsal: Callable[[], object] = lambda: None,
        **how: Any,
    ) -> None:
        loss_fn = how.get("loss_fn")
        self._form, self._card = batch_form(batch_shape, loss_fn), card
        self._on_rehearsal = on_rehearsal
        self._rehearsal = Rehearsal(model, image_shape=input_of(self._form, loss_fn), **how)
        self.parts = self._rehearsal.parts()
        if not self.parts:
            raise ValueError(
                f"model: {type(model).__name__} has no blocks that can be told by name"
            )
        self._words: list[str] = []
        self._used: list[list[BlockUse]] = []
        self._peaks: list[int] = []
        for words in levels_of(self.parts):
            try:
                estimate, used = self._rehearse(words)
            except NotRecomputable as reason:
                if not words or isinstance(reason, WritesCache):
                    raise
                continue  # an attention that is not the fused one
            self._words.append(words)
            self._used.append(used)
            self._peaks.append(estimate.peak_bytes)

    def plan(self, memory_bytes: int) -> RecomputePlan:
        """The plan that takes the least time of those that fit.

        Raises:
            ValueError: none fits.
        """
        # before the first block there is the same at every level: the lowest bound that holds
        before = max(self._before(place) for place in range(len(self._words)))
        room = memory_bytes - before
        for _ in range(_TRIES):
            levels = least_time(self._blocks(), room)
            if levels is None:
                break
            blocks = self._options(levels)
            peak = self._peak_of(blocks)
            if peak <= memory_bytes:
                return self._told(levels, blocks, memory_bytes, peak)
            room -= peak - memory_bytes
        least = least_time(self._blocks(), least_room(self._blocks()))
        assert least is not None
        blocks = self._options(least)
        peak = self._peak_of(blocks)
        if peak <= memory_bytes:
            return self._told(least, blocks, memory_bytes, peak)
        raise ValueError(
            f"memory_bytes: a step on {' × '.join(map(str, shape_of(self._form)))} takes at least "
            f"{peak / 2**20:,.0f} MiB ({RecomputeWords.of(blocks)}), got "
            f"{memory_bytes / 2**20:,.0f} MiB; take a smaller batch and accumulate gradients"
        )

    def between(self, count: int) -> list[int]:
        """As many memories, in bytes, evenly between the most and the least that a level takes."""
        least, most = min(self._peaks), self._peaks[0]
        return [most - (most - least) * (n + 1) // (count + 1) for n in range(count)]

    def _rehearse(self, words: str) -> tuple[MemoryEstimate, list[BlockUse]]:
        self._on_rehearsal()
        self._rehearsal.recompute(words)
        return self._rehearsal.in_blocks(self._form)

    def _before(self, place: int) -> int:
        """Bytes that are there before the first block of a rehearsed step, by its peak."""
        kept, highest = 0, 0
        for use in self._used[place]:
            highest = max(highest, kept + use.most_bytes)
            kept += use.kept_bytes
        return self._peaks[place] - highest

    def _blocks(self) -> list[list[BlockLevel]]:
        """Of each block, what it takes at each level."""
        return [
            [
                BlockLevel(
                    max(own.kept_bytes, 0),
                    own.most_bytes,
                    self._card.seconds_of(own.backward, captured=True),
                )
                for own in (used[block] for used in self._used)
            ]
            for block in range(len(self.parts))
        ]

    def _options(self, levels: Sequence[int]) -> dict[str, tuple[str, ...]]:
        every = [
            RecomputeWords.parse(words).for_blocks(self.parts) if words else {}
            for words in self._words
        ]
        return {
            block: every[level].get(block, ())
            for block, level in zip(self.parts, levels, strict=True)
        }

    def _peak_of(self, blocks: Mapping[str, Sequence[str]]) -> int:
        self._on_rehearsal()
        self._rehearsal.recompute(str(RecomputeWords.of(blocks)))
        return self._rehearsal.at(self._form).peak_bytes

    def _told(
        self,
        levels: Sequence[int],
        blocks: Mapping[str, tuple[str, ...]],
        memory_bytes: int,
        peak: int,
    ) -> RecomputePlan:
        taken = self._blocks()
        chosen = {
            name: (own[level], own[0])
            for name, own, level in zip(self.parts, taken, levels, strict=True)
        }
        return RecomputePlan(
            blocks=blocks,
            modules=self._rehearsal.recompute(str(RecomputeWords.of(blocks))).modules,
            memory_bytes=memory_bytes,
            peak_bytes=peak,
            plain_peak_bytes=self._peaks[0],
            saved_bytes={
                name: plain.kept_bytes - own.kept_bytes for name, (own, plain) in chosen.items()
            },
            added_seconds={
                name: max(own.seconds - plain.seconds, 0.0) for name, (own, plain) in chosen.items()
            },
            card=self._card.name,
        )
