"""How much all blocks of a model may compute again, level by level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

# in `RecomputeWords`, from nothing to everything
LEVELS = ("", "mlp", "qkv", "mlp,qkv", "attention", "mlp,attention", "block")


def levels_of(parts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Those of `LEVELS` that a model has blocks for.

    Args:
        parts: of each block, what of it can be computed again.
    """
    known = {option for own in parts.values() for option in own}
    return (level for level in LEVELS if not level or known.issuperset(level.split(",")))
