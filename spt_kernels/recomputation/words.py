"""`RecomputeWords`: what is computed again, in one line of text, as a command or a file has it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

OPTIONS = ("mlp", "qkv", "attention", "block")
NOTHING = "nothing"

_WORD = re.compile(r"(?P<option>[a-z]+)(@(?P<first>\d+)(-(?P<last>\d+))?)?")


@dataclass(frozen=True)
class RecomputeWords:
    """Options, each for all blocks that have such a part or for some, by their places from 0 on.

    `"mlp"`, `"mlp,qkv"`, `"block@0-5,mlp@6-11,qkv@6"` and `"nothing"` are such lines.

    Attributes:
        words: (option, first, last); first and last are None where it is for all blocks.
    """

    words: tuple[tuple[str, int | None, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> RecomputeWords:
        """Read a line.

        Raises:
            ValueError: it is none.
        """
        if text.strip() == NOTHING:
            return cls(())
        words: list[tuple[str, int | None, int | None]] = []
        for word in text.replace(" ", "").split(","):
            found = _WORD.fullmatch(word)
            option = found["option"] if found is not None else ""
            if found is None or option not in OPTIONS:
                raise ValueError(
                    f"recompute: expected {', '.join(OPTIONS)}, of all blocks or of some as in "
                    f"block@0-5,mlp@6-11, or {NOTHING}, got {text!r}"
                )
            first = None if found["first"] is None else int(found["first"])
            last = first if found["last"] is None else int(found["last"])
            if first is not None and last is not None and last < first:
                raise ValueError(f"recompute: {word!r} ends before it begins")
            words.append((option, first, last))
        return cls(tuple(words))

    @classmethod
    def of(cls, blocks: Mapping[str, Sequence[str]]) -> RecomputeWords:
        """The line for what was chosen for every block, in the model's order."""
        words: list[tuple[str, int | None, int | None]] = []
        chosen = list(blocks.values())
        for option in OPTIONS:
            places = [place for place, options in enumerate(chosen) if option in options]
            if len(places) == len(chosen):
                words.append((option, None, None))
                continue
            # what lies side by side has the same distance to its number
            for _, run in itertools.groupby(enumerate(places), lambda own: own[1] - own[0]):
                side_by_side = [place for _, place in run]
                words.append((option, side_by_side[0], side_by_side[-1]))
        return cls(tuple(words))

    def __str__(self) -> str:
        return ",".join(_told(*word) for word in self.words)

    def for_blocks(self, blocks: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """The options of each block, of which its own are given.

        Raises:
            ValueError: a block that is named has no such part or is none, or no block has one.
        """
        names = list(blocks)
        chosen: dict[str, list[str]] = {name: [] for name in names}
        for option, first, last in self.words:
            if first is None or last is None:
                some = [name for name in names if option in blocks[name]]
            elif last < len(names):
                some = names[first : last + 1]
            else:
                raise ValueError(
                    f"recompute: the model has {len(names)} blocks, from 0 on, got {str(self)!r}"
                )
            if not some:
                why = why_without(option, blocks.values())
                raise ValueError(f"recompute: no block of the model has a part for {option!r}{why}")
            for name in some:
                if option not in blocks[name]:
                    why = why_without(option, [blocks[name]])
                    raise ValueError(f"recompute: {name} has no part for {option!r}{why}")
                if option not in chosen[name]:
                    chosen[name].append(option)
        return {name: tuple(options) for name, options in chosen.items()}


def why_without(option: str, blocks: Iterable[Container[str]]) -> str:
    """Why blocks, whose options are given, do not have this one, as the end of a message."""
    if option == "qkv" and any("attention" in own for own in blocks):
        return ", as its attention is not F.scaled_dot_product_attention; take 'attention'"
    return ""


def _told(option: str, first: int | None, last: int | None) -> str:
    if first is None:
        return option
    return f"{option}@{first}" if first == last else f"{option}@{first}-{last}"
