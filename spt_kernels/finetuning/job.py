"""The description of one fine-tuning run: all that its result depends on, the machine aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..methods import Method
from .models import ModelSource
from .recipe import Recipe
from .splits import ImageSource


@dataclass(frozen=True)
class FinetuneJob:
    """Everything that the result of a run depends on, machine aside.

    Attributes:
        model: the base model.
        images: the task.
        method: what is trained.
        recipe: how.
        form: fields of `Preprocessing` that are not to be the model's own.
        sensitivity: a file to take the sensitivities from, in place of measuring them.
        plan: a file to take the plan from, in place of making one.
    """

    model: ModelSource
    images: ImageSource
    method: Method = field(default_factory=Method)
    recipe: Recipe = field(default_factory=Recipe)
    form: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: str | None = None
    plan: str | None = None

    def __post_init__(self) -> None:
        if self.model.weights is None and not self.model.pretrained and self.method.name != "full":
            raise ValueError(
                f"weights: method {self.method.name!r} needs a pre-trained model: name a file of "
                "weights, or let timm download them (pretrained)"
            )
        for name in ("sensitivity", "plan"):
            path = getattr(self, name)
            if path is not None and not self.method.is_sensitivity_aware:
                raise ValueError(f"{name}: method {self.method.name!r} does not use one")
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name}: no such file: {path}")
        own = {"budget": self.method.budget, "rank": self.method.rank, "head": self.method.head}
        for name, value in {**own, "sensitivity": self.sensitivity}.items():
            if self.plan is not None and value is not None:
                raise ValueError(f"{name}: a plan has its own; leave it out")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return plain(asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FinetuneJob:
        """Read what `to_json` wrote."""
        images = {**value["images"], "classes": tuple(value["images"]["classes"])}
        form = {k: tuple(v) if isinstance(v, list) else v for k, v in value["form"].items()}
        return cls(
            ModelSource(**value["model"]),
            ImageSource(**images),
            Method(**value["method"]),
            Recipe(**value["recipe"]),
            form,
            value["sensitivity"],
            value["plan"],
        )

    def difference_from(self, old: Mapping[str, Any]) -> str | None:
        """The first value in which an older job, as JSON, differs from this one; `None` if none."""
        new_job = self.to_json()
        if old == new_job:
            return None
        for part, new in new_job.items():
            was = old.get(part)
            if was == new:
                continue
            if isinstance(new, dict) and isinstance(was, dict):
                name = next((n for n in {**was, **new} if was.get(n) != new.get(n)), None)
                if name is None:
                    continue  # an option that there was not yet, left as it is by default
                return f"{name} was {was.get(name)}, is {new.get(name)}"
            return f"{part} was {was}, is {new}"
        return None if old.keys() == new_job.keys() else "it is of another version"


def plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
