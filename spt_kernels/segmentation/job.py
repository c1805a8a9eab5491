"""The description of one segmentation run: all that its result depends on, the machine aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from ..finetuning.base.models import ModelSource
from ..finetuning.job.given_plan import check_given, load_plan, method_of
from ..finetuning.job.job import check_pretrained, flat, plain
from ..methods import Method
from ..methods.method import check_none_is_lacking, check_number, check_positive
from .recipe import SegmentationRecipe
from .suited import check_suited


@dataclass(frozen=True)
class SegmentationJob:
    """Everything that the result of a run depends on, machine aside.

    Attributes:
        model: the backbone.
        data: a folder as ADE20K's.
        method: what is trained of the backbone; the decoder is always trained whole. `None` is as
            `FinetuneJob` has it.
        recipe: how.
        size: side of the squares that it is trained on, and of the windows of a test.
        stride: pixels from one window to the next; `None` is two thirds of `size`, SETR's 341.
        channels: of the decoder's convolutions.
        auxiliary: after which blocks, from 1, auxiliary heads read; `None` is as `Setr` has it.
        mean: of each colour, in 0 to 1; `None` is the backbone's.
        std: likewise.
        val_share: of the training images, held out to know by which iteration was best; `0` for
            none.
        sensitivity: a file to take the sensitivities from, in place of measuring them.
        plan: a file to take the plan from, in place of making one.
    """

    model: ModelSource
    data: str
    method: Method = None  # type: ignore[assignment]  # None is replaced when it is made
    recipe: SegmentationRecipe = field(default_factory=SegmentationRecipe)
    size: int = 512
    stride: int | None = None
    channels: int = 256
    auxiliary: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    val_share: float = 0.0
    sensitivity: str | None = None
    plan: str | None = None
    command: ClassVar[str] = "segment"  # that runs it

    def __post_init__(self) -> None:
        if self.method is None:
            made = Method() if self.plan is None else method_of(load_plan(self.plan))
            object.__setattr__(self, "method", made)
        check_pretrained(self.model, self.method)
        check_suited(self.method.name)
        check_given(self)
        if self.method.head is not None:
            raise ValueError("head: it is the decoder, which is trained whole; leave it out")
        check_none_is_lacking(self)
        for name in ("size", "stride", "channels"):
            check_number(name, getattr(self, name), int)
        for name in ("size", "channels"):
            check_positive(name, getattr(self, name))
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share: expected at least 0 and below 1, got {self.val_share}")
        if self.recipe.patience is not None and self.val_share == 0:
            raise ValueError(
                "patience: there are no validation images to know a better iteration by: hold out "
                "a share of the training images (val_share)"
            )
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

        The number of iterations may be larger than it was: a run can be made longer. What is
        computed again may be anything: a run that has met the end of its memory can go on in less.
        """
        free: dict[str, Any] = {"recompute": self.recipe.recompute}
        if self.recipe.iterations >= old.recipe.iterations:
            free["iterations"] = self.recipe.iterations
        old = replace(old, recipe=replace(old.recipe, **free))
        was, now = flat(old.to_json()), flat(self.to_json())
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                return f"{': '.join(key)} was {was.get(key)}, is {now.get(key)}"
        return None
