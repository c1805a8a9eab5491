"""The description of one segmentation run: all that its result depends on, the machine aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..finetuning.job import flat, plain
from ..finetuning.models import ModelSource
from ..methods import Method
from ..methods.method import check_positive
from .recipe import SegmentationRecipe


@dataclass(frozen=True)
class SegmentationJob:
    """Everything that the result of a run depends on, machine aside.

    Attributes:
        model: the backbone.
        data: a folder as ADE20K's.
        method: what is trained of the backbone; the decoder is always trained whole.
        recipe: how.
        size: side of the squares that it is trained on, and of the windows of a test.
        stride: pixels from one window to the next; `None` is two thirds of `size`, SETR's 341.
        channels: of the decoder's convolutions.
        auxiliary: after which blocks, from 1, auxiliary heads read; `None` is as `Setr` has it.
        mean: of each colour, in 0 to 1; `None` is the backbone's.
        std: likewise.
    """

    model: ModelSource
    data: str
    method: Method = field(default_factory=Method)
    recipe: SegmentationRecipe = field(default_factory=SegmentationRecipe)
    size: int = 512
    stride: int | None = None
    channels: int = 256
    auxiliary: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.model.weights is None and not self.model.pretrained and self.method.name != "full":
            raise ValueError(
                f"weights: method {self.method.name!r} needs a pre-trained model: name a file of "
                "weights, or let timm download them (`pretrained`)"
            )
        # PEFT wraps a model, which then is no Setr; NOAH's search goes by classes of images; an MLP
        # head replaces a linear one
        if self.method.name.startswith(("peft-", "noah", "mlp-")):
            raise ValueError(f"method: {self.method.name!r} is for classification alone")
        if self.method.head is not None:
            raise ValueError("head: it is the decoder, which is trained whole; leave it out")
        for name in ("size", "channels"):
            check_positive(name, getattr(self, name))
        if self.stride is None:
            object.__setattr__(self, "stride", max(1, 2 * self.size // 3))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        value: dict[str, Any] = plain(asdict(self))
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SegmentationJob:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in value.items()
        }
        values["model"] = ModelSource(**value["model"])
        values["method"] = Method.from_json(value["method"])
        values["recipe"] = SegmentationRecipe(**value["recipe"])
        return cls(**values)

    def difference_from(self, old: SegmentationJob) -> str | None:
        """The first value in which an older job differs from this one; `None` if none.

        The number of iterations may be larger than it was: a run can be made longer.
        """
        if self.recipe.iterations >= old.recipe.iterations:
            longer = replace(old.recipe, iterations=self.recipe.iterations)
            old = replace(old, recipe=longer)
        was, now = flat(old.to_json()), flat(self.to_json())
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                return f"{': '.join(key)} was {was.get(key)}, is {now.get(key)}"
        return None
