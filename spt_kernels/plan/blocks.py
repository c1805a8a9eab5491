"""Which blocks parameters belong to, told by their names, and which parameters lie below one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..model import ParameterInfo
from ..model.parameter_info import blocks_among
from .table import in_numeric_order

# What a model does before its first block, wherever its parameters are listed
_BEFORE_BLOCKS = re.compile(
    r"(?:^|\.)(?:patch_embed|embeddings|stem|conv_stem|conv_proj|norm_pre|ln_pre|pre_layr?norm)s?\."
    r"|(?:_embed|_embedding|_token)s?$"
)


def blocks_in_order(info: Mapping[str, ParameterInfo]) -> tuple[str, ...]:
    """Names of the innermost blocks in the order in which a model calls them, by their numbers."""
    return tuple(in_numeric_order(blocks_among(info)))


def block_named(info: Mapping[str, ParameterInfo], block: int | str) -> str:
    """The name of a block that is given by its number or its name, or by the name of a stage.

    Args:
        info: of the parameters of a model.
        block: the number counts from 0 through all stages; where there is but one row of blocks, it
            is the one in their names. A stage stands for its first block.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such block, or the names tell no blocks at all.
    """
    blocks = blocks_in_order(info)
    if not isinstance(block, (int, str)) or isinstance(block, bool):
        raise TypeError(f"from_block must be a block's number or its name, got {block!r}")
    if not blocks:
        some = ", ".join(list(info)[:3])
        raise ValueError(
            "from_block: the names of the parameters tell no blocks, as blocks.0 or "
            f"encoder.layer.0 do: {some}"
        )
    numbers = _numbers(blocks)
    if isinstance(block, int):
        if block in numbers:
            return blocks[numbers.index(block)]
    else:
        found = next((own for own in blocks if f"{own}.".startswith(f"{block}.")), None)
        if found is not None:
            return found
    raise ValueError(
        f"from_block: expected a block from {numbers[0]} ({blocks[0]}) to {numbers[-1]} "
        f"({blocks[-1]}), or its name, got {block!r}"
    )


def names_below(info: Mapping[str, ParameterInfo], block: str) -> frozenset[str]:
    """Names of the parameters whose gradient would need one of something before `block`.

    These are those of earlier blocks, and all outside of blocks that come before it in the order of
    `info`, a model's: stem, tokens, positions, what stands between stages.

    Args:
        info: of the parameters of a model.
        block: one of `blocks_in_order`.
    """
    number = {name: n for n, name in enumerate(blocks_in_order(info))}
    first, reached = number[block], -1
    below = set()
    for name, what in info.items():
        if what.block in number:
            place = number[what.block]
            reached = max(reached, place)
        else:
            place = -1 if _BEFORE_BLOCKS.search(name) else reached
        if place < first:
            below.add(name)
    return frozenset(below)


def _numbers(blocks: Iterable[str]) -> list[int]:
    """What each block is called by; the numbers in their names where these differ in no more."""
    split = [name.rpartition(".") if "." in name else ("", "", name) for name in blocks]
    own = [last for _, _, last in split]
    if len({before for before, _, _ in split}) == 1 and all(last.isdigit() for last in own):
        return [int(last) for last in own]
    return list(range(len(own)))
