"""`NoahSpace`: the architectures that NOAH searches among, what they train, how one is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from .noah_architecture import KINDS, NoahArchitecture

MUTATION = 0.2  # how likely a kind of module is changed
DEPTH_MUTATION = 0.4  # how likely that changes its depth


@dataclass(frozen=True)
class NoahSpace:
    """What the modules of a ViT may be: each kind in the first blocks, of a size from a list.

    The sizes and depths are those that NOAH was published with for VTAB-1k (Zhang et al., 2022): 1,
    5 or 10 in the first 3, 6, 9 or all of 12 blocks, here in so many quarters of them.

    Attributes:
        depth: blocks.
        width: of a token.
        qkv: rows of the fused q, k, v.
        sizes: that a module may have, rising.
    """

    depth: int
    width: int
    qkv: int
    sizes: tuple[int, ...] = (1, 5, 10)

    @property
    def depths(self) -> tuple[int, ...]:
        """In how many blocks, from the first on, a kind of module may be; rising."""
        return tuple(sorted({math.ceil(self.depth * quarters / 4) for quarters in (1, 2, 3, 4)}))

    @property
    def largest(self) -> NoahArchitecture:
        """What all others are cut from."""
        return NoahArchitecture.uniform(self.sizes[-1], self.depth)

    @property
    def smallest(self) -> NoahArchitecture:
        """What trains least."""
        blocks = range(self.depth)
        sizes = tuple(self.sizes[0] if block < self.depths[0] else 0 for block in blocks)
        return NoahArchitecture(*(sizes for _ in KINDS))

    def count(self, architecture: NoahArchitecture) -> int:
        """The parameters of its modules.

        Prompts have a row per token; an Adapter of width w has 2·w·d + w + d, a LoRA of rank r has
        r·(d + rows), with d the width of a token.
        """
        return self._count(architecture.prompts, architecture.adapters, architecture.loras)

    def _count(
        self, prompts: tuple[int, ...], adapters: tuple[int, ...], loras: tuple[int, ...]
    ) -> int:
        return (
            sum(prompts) * self.width
            + sum(adapters) * (2 * self.width + 1)
            + sum(size > 0 for size in adapters) * self.width
            + sum(loras) * (self.width + self.qkv)
        )

    def check_limit(self, limit: int) -> None:
        """Refuse a limit, in parameters, that no architecture keeps within."""
        least = self.count(self.smallest)
        if limit < least:
            raise ValueError(
                f"budget: the smallest architecture of NOAH's trains {least:,}, got {limit:,}"
            )

    def sample(self, random: Random, limit: int | None = None) -> NoahArchitecture:
        """Draw one: for each kind a depth, then a size per block.

        Args:
            random: what to draw from.
            limit: the most parameters. What is drawn beyond it is shrunk by steps drawn at random,
                each to the next smaller size of a block or the next smaller depth.

        Raises:
            ValueError: nothing is within the limit.
        """
        drawn = [self._to_depth((), random.choice(self.depths), random) for _ in KINDS]
        if limit is not None:
            self.check_limit(limit)
            while self._count(*drawn) > limit:
                kinds = [n for n, sizes in enumerate(drawn) if self._steps_down(sizes)]
                kind = random.choice(kinds)
                drawn[kind] = self._step_down(drawn[kind], random)
        return NoahArchitecture(*drawn)

    def mutated(self, parent: NoahArchitecture, random: Random) -> NoahArchitecture:
        """Change each kind of module with probability 0.2: with 0.4 its depth, else one size.

        The published code leaves the sizes as they are.
        """
        child = parent
        for kind in KINDS:
            if random.random() >= MUTATION:
                continue
            sizes = _without_zeros(getattr(child, kind))
            if random.random() < DEPTH_MUTATION:
                changed = self._to_depth(sizes, random.choice(self.depths), random)
            else:
                block = random.randrange(len(sizes))
                new = (*sizes[:block], random.choice(self.sizes), *sizes[block + 1 :])
                changed = self._to_depth(new, len(new), random)
            child = replace(child, **{kind: changed})
        return child

    def crossed(
        self, one: NoahArchitecture, other: NoahArchitecture, random: Random
    ) -> NoahArchitecture:
        """Take each kind of module as a whole from one of two parents."""
        return NoahArchitecture(*(getattr(random.choice((one, other)), kind) for kind in KINDS))

    def _to_depth(self, sizes: tuple[int, ...], depth: int, random: Random) -> tuple[int, ...]:
        """Sizes cut to `depth`, or drawn up to it, and zeros for the blocks after it."""
        drawn = tuple(random.choice(self.sizes) for _ in range(depth - len(sizes)))
        return (*sizes[:depth], *drawn, *(0,) * (self.depth - depth))

    def _steps_down(self, sizes: tuple[int, ...]) -> list[int | None]:
        """Blocks whose size can be the next smaller one; None where there can be fewer of them."""
        blocks = [block for block, size in enumerate(sizes) if size > self.sizes[0]]
        return [*blocks, None] if len(_without_zeros(sizes)) > self.depths[0] else [*blocks]

    def _step_down(self, sizes: tuple[int, ...], random: Random) -> tuple[int, ...]:
        """One of these steps, drawn."""
        block = random.choice(self._steps_down(sizes))
        if block is not None:
            smaller = self.sizes[self.sizes.index(sizes[block]) - 1]
            return (*sizes[:block], smaller, *sizes[block + 1 :])
        shorter = max(depth for depth in self.depths if depth < len(_without_zeros(sizes)))
        return self._to_depth(sizes, shorter, random)


def _without_zeros(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size)
