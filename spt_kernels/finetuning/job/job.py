"""The description of one fine-tuning run: all that its result depends on, the machine aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ...methods import Method
from ..base.models import ModelSource
from ..images.splits import ImageSource
from .given_plan import check_given, load_plan, method_of
from .recipe import HOW_IT_FITS, Recipe


@dataclass(frozen=True)
class FinetuneJob:
    """Everything that the result of a run depends on, machine aside.

    Attributes:
        model: the base model.
        images: the task.
        method: what is trained. `None` is the one that made `plan`, and without a plan SPT-LoRA;
            with one, options of the method that are not the plan's are refused.
        recipe: how.
        form: fields of `Preprocessing` that are not to be the model's own.
        sensitivity: a file to take the sensitivities from, in place of measuring them.
        plan: a file to take the plan from, in place of making one.
    """

    model: ModelSource
    images: ImageSource
    method: Method = None  # type: ignore[assignment]  # None is replaced when it is made
    recipe: Recipe = field(default_factory=Recipe)
    form: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: str | None = None
    plan: str | None = None
    command: ClassVar[str] = "finetune"  # that runs it

    def __post_init__(self) -> None:
        if self.method is None:
            made = Method() if self.plan is None else method_of(load_plan(self.plan))
            object.__setattr__(self, "method", made)
        check_pretrained(self.model, self.method)
        check_given(self)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return plain(asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FinetuneJob:
        """Read what `to_json` wrote; `ValueError` if that was of another kind of run."""
        if "images" not in value:
            raise ValueError("the run is of another command than finetune")
        images = {**value["images"], "classes": tuple(value["images"]["classes"])}
        form = {k: tuple(v) if isinstance(v, list) else v for k, v in value["form"].items()}
        return cls(
            ModelSource(**value["model"]),
            ImageSource(**images),
            Method.from_json(value["method"]),
            Recipe(**value["recipe"]),
            form,
            value["sensitivity"],
            value["plan"],
        )

    def difference_from(self, old: FinetuneJob) -> str | None:
        """The first value in which an older job differs from this one; `None` if none.

        The number of epochs may be larger than it was: a run can be made longer. What makes a step
        fit may be anything: a run that has met the end of its memory can go on in less. The name of
        a preset says nothing that the values do not.
        """
        was, now = old.to_json(), self.to_json()
        for free in ("preset", *HOW_IT_FITS):
            was["recipe"][free] = now["recipe"][free]
        if self.recipe.epochs >= old.recipe.epochs:
            was["recipe"]["epochs"] = now["recipe"]["epochs"]
        for part, new in now.items():
            if was[part] == new:
                continue
            if isinstance(new, dict) and isinstance(was[part], dict):
                old_part = was[part]
                name = next((n for n in {**old_part, **new} if old_part.get(n) != new.get(n)), None)
                if name is None:
                    continue  # an option that there was not yet, left as it is by default
                return f"{name} was {old_part.get(name)}, is {new.get(name)}"
            return f"{part} was {was[part]}, is {new}"
        return None


def check_pretrained(model: ModelSource, method: Method) -> None:
    """Refuse weights drawn at random for a method that trains less than all; `ValueError`."""
    if model.weights is None and not model.pretrained and method.name != "full":
        raise ValueError(
            f"weights: method {method.name!r} needs a pre-trained model: name a file of weights, "
            "or let timm download them (`pretrained`)"
        )


Key = tuple[str, ...]


def flat(value: Mapping[str, Any], prefix: Key = ()) -> dict[Key, Any]:
    """The values of nested mappings, each by the names that lead to it."""
    found: dict[Key, Any] = {}
    for name, inner in value.items():
        is_nested = isinstance(inner, Mapping)
        found |= flat(inner, (*prefix, name)) if is_nested else {(*prefix, name): inner}
    return found


def plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
