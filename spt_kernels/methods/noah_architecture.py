"""`NoahArchitecture`: how large the modules are that NOAH puts into each block of a ViT."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class NoahArchitecture:
    """Sizes by block, from the first to the last; 0 where a block has no such module.

    Attributes:
        prompts: tokens before the patches.
        adapters: widths of the bottleneck after the MLP.
        loras: ranks on attention's fused q, k, v.

    Raises:
        TypeError: a size is no whole number.
        ValueError: one is below 0, or not all are of as many blocks, or there is no module at all.
    """

    prompts: tuple[int, ...]
    adapters: tuple[int, ...]
    loras: tuple[int, ...]

    def __post_init__(self) -> None:
        for kind in KINDS:
            sizes = getattr(self, kind)
            if not isinstance(sizes, (tuple, list)) or not all(type(size) is int for size in sizes):
                raise TypeError(
                    f"architecture: {kind}: expected a whole number per block, got {sizes!r}"
                )
            if any(size < 0 for size in sizes):
                raise ValueError(f"architecture: {kind}: expected 0 or more, got {min(sizes)}")
            object.__setattr__(self, kind, tuple(sizes))
        depths = {kind: len(getattr(self, kind)) for kind in KINDS}
        if len(set(depths.values())) > 1:
            told = ", ".join(f"{count} {kind}" for kind, count in depths.items())
            raise ValueError(f"architecture: expected as many of each, one per block, got {told}")
        if not any(any(getattr(self, kind)) for kind in KINDS):
            raise ValueError("architecture: expected a module in one block at least, got none")

    @classmethod
    def uniform(cls, size: int, depth: int) -> NoahArchitecture:
        """All three modules of one size in each of `depth` blocks."""
        return cls(*((size,) * depth for _ in KINDS))

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.prompts)

    @property
    def by_block(self) -> tuple[tuple[int, int, int], ...]:
        """For each block its prompts, the width of its Adapter, and the rank of its LoRA."""
        return tuple(zip(self.prompts, self.adapters, self.loras, strict=True))

    def to_json(self) -> dict[str, list[int]]:
        """As plain JSON values."""
        return {kind: list(sizes) for kind, sizes in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NoahArchitecture:
        """Read what `to_json` wrote; whatever else is said beside it is left aside.

        Raises:
            ValueError: a kind of module is missing.
            TypeError: as the class itself.
        """
        if not isinstance(value, Mapping) or (missing := [k for k in KINDS if k not in value]):
            lacking = "" if not isinstance(value, Mapping) else f" without {', '.join(missing)}"
            raise ValueError(
                f"architecture: expected {', '.join(KINDS)}, got {type(value).__name__}{lacking}"
            )
        return cls(*(value[kind] for kind in KINDS))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NoahArchitecture:
        """Read a JSON file of one, as a run leaves it in `architecture.json`.

        Raises:
            ValueError: there is no such file, or it is no architecture.
        """
        if not Path(path).is_file():
            raise ValueError(f"architecture: no such file: {os.fspath(path)}")
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def __str__(self) -> str:
        return ", ".join(f"{kind} {' '.join(map(str, getattr(self, kind)))}" for kind in KINDS)


KINDS = tuple(field.name for field in fields(NoahArchitecture))
