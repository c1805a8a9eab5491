"""What a plan does with one operation of one block, in numbers of parameters."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cell:
    """What a plan does with one operation of one block, in numbers of parameters.

    Attributes:
        numel: how many there are.
        selected: how many are among the most sensitive ones (Eq. 4).
        unstructured: how many of them are trained as they are.
        structured: how many a LoRA or an Adapter adds in their place (Eq. 5).
    """

    numel: int = 0
    selected: int = 0
    unstructured: int = 0
    structured: int = 0

    @property
    def trainable(self) -> int:
        """Parameters trained here."""
        return self.unstructured + self.structured

    def __add__(self, other: Cell) -> Cell:
        return Cell(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cell)))
