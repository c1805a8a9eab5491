"""Options that are chosen on the validation images: which they may be, and each candidate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..finetuning.job.recipe import Recipe
from ..methods import Method
from ..methods.method import check_one_of

OF_RECIPE = (
    *("lr", "weight_decay", "epochs", "warmup_epochs", "batch_size", "drop_path"),
    *("label_smoothing", "clip_grad"),
)
OF_METHOD = ("budget", "rank", "scale", "dropout")
CHOOSABLE = (*OF_METHOD, *OF_RECIPE)

Options = Mapping[str, Any]  # field of Method or Recipe -> value


def checked(choices: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """The choices with their values as tuples.

    Raises:
        ValueError: an option that cannot be chosen, one with fewer than two values, or one twice.
    """
    made: dict[str, tuple[Any, ...]] = {}
    for name, values in choices.items():
        check_one_of("choices", name, CHOOSABLE)
        made[name] = tuple(values)
        if len(set(made[name])) < max(2, len(made[name])):
            shown = ", ".join(map(str, made[name])) or "none"
            raise ValueError(f"choices: expected two or more values of {name}, got {shown}")
    return made


def candidates_of(choices: Mapping[str, Sequence[Any]], method: Method) -> list[dict[str, Any]]:
    """All combinations of the values that `method` reads; none where there is nothing to choose.

    An option that the method does not read is no choice for it: a rank is none of `bias`. A method
    that searches has one candidate at least, which is where it does.
    """
    own = {n: v for n, v in choices.items() if n in OF_RECIPE or n in method.entry.options}
    combined = [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]
    return combined if len(combined) > 1 or method.is_searched else []


def with_options(method: Method, recipe: Recipe, options: Options) -> tuple[Method, Recipe]:
    """Both with the options of a candidate.

    Raises:
        ValueError: a value that an option cannot have.
    """
    of_method = {name: value for name, value in options.items() if name in OF_METHOD}
    of_recipe = {name: value for name, value in options.items() if name in OF_RECIPE}
    return replace(method, **of_method), replace(recipe, **of_recipe)


def named(options: Options) -> str:
    """A candidate's name, as text and as a folder."""
    return ",".join(f"{name}={value}" for name, value in options.items()) or "search"
