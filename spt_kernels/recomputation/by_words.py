"""`recompute_by`: recomputation as a line of text has it."""

from __future__ import annotations

from torch import nn

from .choice import Recomputation, recompute
from .places import places_of
from .words import RecomputeWords


def recompute_by(model: nn.Module, line: str) -> Recomputation:
    """`recompute`, by what `RecomputeWords` reads, such as `"mlp"` or `"block@0-5,mlp@6-11"`.

    Raises:
        ValueError: no such line, or a block that the model has not; the model is then as it was.
    """
    return recompute(model, blocks_by(model, line))


def blocks_by(model: nn.Module, line: str) -> dict[str, tuple[str, ...]]:
    """Block -> its options, by a line; errors are those of `recompute_by`."""
    return RecomputeWords.parse(line).for_blocks(parts_of(model))


def parts_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each block of a model, in its order, and the options that it has parts for."""
    return {name: tuple(places.modules) for name, places in places_of(model).items()}
