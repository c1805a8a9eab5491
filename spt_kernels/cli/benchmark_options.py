"""The options of a benchmark: several methods and seeds, choices, and where runs compute."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from ..finetuning.job.presets import PRESETS, Preset
from ..finetuning.job.recipe import Recipe
from ..methods import METHODS, Method, entry_of
from .options import described, split_names
from .training_options import MethodOptions, RecipeOptions, parse_budget

_TASKS = "Tasks"
_RUN = "Run"
_OF_SUITE = {"fgvc": "paper-fgvc"}  # whose images the paper prepares in another way


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how options are chosen on them."""

    root: Annotated[
        Path | None, described(_TASKS, "--root -r FOLDER", "Where the images of all tasks are.")
    ] = None
    tasks: Annotated[str | None, described(_TASKS, "--tasks A,B,…", "These alone [all].")] = None
    choices: Annotated[
        list[str] | None,
        described(
            _TASKS,
            "--choose NAME=A,B,…",
            "Try these values of an option, as lr=1e-3,5e-4, on the validation images of each "
            "task, and run the best; repeat for all combinations [nothing is chosen].",
        ),
    ] = None

    def names(self) -> tuple[str, ...]:
        """The tasks that were named; empty for all."""
        return split_names(self.tasks, "--tasks")

    def values(self) -> dict[str, tuple[Any, ...]]:
        """Option -> values to choose among."""
        made: dict[str, tuple[Any, ...]] = {}
        for text in self.choices or ():
            name, equals, values = text.partition("=")
            name = name.strip().replace("-", "_")
            if not equals or not name or name in made:
                raise ValueError(f"--choose: expected NAME=A,B,…, each name once, got {text!r}")
            made[name] = tuple(_value(name, value) for value in split_names(values))
        return made


@dataclass(frozen=True)
class MethodsOptions(MethodOptions):
    """What is trained, by several methods; each takes the options that it reads."""

    method: Annotated[
        str | None,
        described("Method", "--methods A,B,…", f"{', '.join(METHODS)} [{Method.name}]."),
    ] = None

    def every(self, preset: Preset) -> tuple[Method, ...]:
        """The methods described, with the options of the preset where none are given.

        Raises:
            ValueError: an unknown method, or an option that none of them reads.
        """
        names = split_names(self.method, "--methods") or (Method.name,)
        given = self.given()
        for name in given:
            if name != "head" and not any(name in entry_of(own).options for own in names):
                raise ValueError(
                    f"--{name.replace('_', '-')}: none of {', '.join(names)} has it; leave it out"
                )
        return tuple(preset.method(name, **_read_by(name, given)) for name in names)


@dataclass(frozen=True)
class SeedsOptions(RecipeOptions):
    """How all are trained, with several seeds."""

    # a list of what there is one of otherwise
    seed: Annotated[str | None, described("Run", "--seeds A,B,…", "Each [0].")] = None  # type: ignore[assignment]

    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        try:
            return tuple(int(seed) for seed in split_names(self.seed or "0"))
        except ValueError as error:
            raise ValueError(f"--seeds: expected numbers as 0,1,2, got {self.seed!r}") from error

    def chosen(self, base: Recipe | None = None) -> Recipe:
        """The recipe described, of no seed."""
        unseeded = RecipeOptions(**{**vars(self), "seed": None})
        return replace(unseeded.chosen(base), seed=Recipe.seed)

    def preset_for(self, suite: str) -> Preset:
        """The preset that is named, or the paper's for a suite."""
        return self.preset() if self.recipe is not None else PRESETS[_OF_SUITE.get(suite, "paper")]


@dataclass(frozen=True)
class GridOptions:
    """Where the runs of a grid compute."""

    devices: Annotated[
        str,
        described(
            _RUN, "--devices A,B,…", "A process on each: auto, cpu, cuda:N, or all GPUs [auto]."
        ),
    ] = "auto"
    jobs: Annotated[
        int,
        described(
            _RUN,
            "--jobs N",
            "Processes on each device, which share the CPU's threads; 0: in this one [1].",
        ),
    ] = 1
    workers: Annotated[
        int, described(_RUN, "--workers N", "Processes of each run that read images [0].")
    ] = 0
    ray: Annotated[
        str | None,
        described(
            _RUN,
            "--ray ADDRESS",
            "Run on a Ray cluster, as HOST:PORT or auto; --output must be shared by its nodes.",
        ),
    ] = None

    def how(self) -> dict[str, Any]:
        """As arguments of `run_benchmark`."""
        return {**vars(self), "devices": split_names(self.devices)}


def _read_by(name: str, given: dict[str, Any]) -> dict[str, Any]:
    known = entry_of(name).options | {"head"}
    return {option: value for option, value in given.items() if option in known}


def _value(name: str, text: str) -> Any:
    if name == "budget":
        return parse_budget(text)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"--choose: expected numbers for {name}, got {text!r}")
    return value
