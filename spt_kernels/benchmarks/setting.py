"""What a benchmark is of: tasks, methods, seeds, and all that their runs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..finetuning.base.models import ModelSource
from ..finetuning.images.splits import ImageSource, may_have_validation
from ..finetuning.job.job import FinetuneJob, Key, flat, plain
from ..finetuning.job.recipe import Recipe
from ..methods import Method
from .candidates import Options, candidates_of, checked, with_options
from .task import BenchmarkTask

_ADDED_TO = ("tasks", "methods", "seeds")  # what an existing benchmark may get more of


@dataclass(frozen=True)
class BenchmarkSetting:
    """A grid of runs, one for each task, method and seed, that differ in nothing else.

    Attributes:
        suite: what the tasks are together, as `VTAB-1k`; a heading of tables.
        model: the base model.
        tasks: in the order of tables.
        methods: likewise; no two of one name.
        seeds: of each task and method.
        recipe: how all are trained; its seed is not read.
        form: fields of `Preprocessing` that are not to be the model's own.
        choices: field of `Recipe` or `Method` -> values. Each method takes, on each task, those
            that are best on the validation images, see `benchmarks.candidates`.

    Raises:
        ValueError: nothing to run, one name twice, a method that the model cannot be tuned by
            without weights, a value that cannot be.
    """

    suite: str
    model: ModelSource
    tasks: tuple[BenchmarkTask, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0,)
    recipe: Recipe = field(default_factory=Recipe)
    form: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "recipe", replace(self.recipe, seed=Recipe.seed))
        object.__setattr__(self, "choices", checked(self.choices))
        named: dict[str, list[Any]] = {
            "tasks": [task.name for task in self.tasks],
            "methods": [method.name for method in self.methods],
            "seeds": list(self.seeds),
        }
        for name, values in named.items():
            if not values:
                raise ValueError(f"{name}: expected at least one, got none")
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"{name}: {twice} is named twice")
        if bad := [name for name in named["tasks"] if Path(name).name != name or name == ".."]:
            raise ValueError(f"tasks: expected a name that a folder can have, got {bad[0]!r}")
        for method in self.methods:  # what no run could have is told before the first
            for options in candidates_of(self.choices, method) or [{}]:
                for seed in self.seeds:
                    self.job(self.tasks[0].final, method, seed, options)

    def job(self, images: ImageSource, method: Method, seed: int, options: Options) -> FinetuneJob:
        """The run of `method` on `images`, with the options that were chosen, if any."""
        own, recipe = with_options(method, replace(self.recipe, seed=seed), options)
        return FinetuneJob(self.model, images, own, recipe, self.form)

    def task(self, name: str) -> BenchmarkTask:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)

    def method(self, name: str) -> Method:
        """The method of that name, as it is before any choice."""
        return next(method for method in self.methods if method.name == name)

    def check_images(self, task: BenchmarkTask) -> None:
        """Look whether a task has images to test with, and to know a better epoch by.

        Raises:
            ValueError: it has none.
        """
        if self.recipe.patience is not None and not may_have_validation(task.final):
            raise ValueError(
                f"patience: what is reported of {task.name} is trained on all images, and there "
                "are none to know a better epoch by; leave it out"
            )
        if not _has_test(task.final):
            raise ValueError(f"tasks: {task.name} has no test images in {task.final.root}")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; tasks and methods by name."""
        value: dict[str, Any] = plain(asdict(self))
        for name in ("tasks", "methods"):
            value[name] = {own["name"]: own for own in value[name]}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkSetting:
        """Read what `to_json` wrote."""
        form = {k: tuple(v) if isinstance(v, list) else v for k, v in value["form"].items()}
        return cls(
            value["suite"],
            ModelSource(**value["model"]),
            tuple(map(_task_of, value["tasks"].values())),
            tuple(map(Method.from_json, value["methods"].values())),
            tuple(value["seeds"]),
            Recipe(**value["recipe"]),
            form,
            value["choices"],
        )

    def joined(self, old: BenchmarkSetting) -> BenchmarkSetting:
        """This one with the tasks, methods and seeds besides that an older one had.

        Raises:
            ValueError: anything else differs; it names what.
        """
        if (difference := self.difference_from(old)) is not None:
            raise ValueError(difference)
        # asked for in another order or in part, a table keeps the order in which it was begun
        tasks = {task.name: task for task in (*old.tasks, *self.tasks)}
        methods = {method.name: method for method in (*old.methods, *self.methods)}
        seeds = dict.fromkeys((*old.seeds, *self.seeds))
        return replace(
            self,
            tasks=tuple(tasks.values()),
            methods=tuple(methods.values()),
            seeds=tuple(seeds),
        )

    def difference_from(self, old: BenchmarkSetting) -> str | None:
        """The first value in which an older setting differs, additions aside; `None` if none."""
        was, now = flat(old.to_json()), flat(self.to_json())
        was["recipe", "preset"] = now["recipe", "preset"]  # a name, and its values are compared
        for key in {**was, **now}:
            is_new = key[0] in _ADDED_TO and not _in_both(key, was, now)
            if not is_new and key != ("seeds",) and was.get(key) != now.get(key):
                return f"{_told(key)} was {was.get(key)}, is {now.get(key)}"
        return None


def _has_test(images: ImageSource) -> bool:
    """Whether test images would be read."""
    if not images.use_test or images.train_list is not None:
        return images.test_list is not None
    return images.layout is not None or (Path(images.root) / "test").is_dir()


def _task_of(value: Mapping[str, Any]) -> BenchmarkTask:
    sources = {
        name: ImageSource(**{**value[name], "classes": tuple(value[name]["classes"])})
        for name in ("choose", "final")
    }
    own = {f.name: value[f.name] for f in fields(BenchmarkTask)}
    return BenchmarkTask(**{**own, **sources})


def _in_both(key: Key, was: Mapping[Key, Any], now: Mapping[Key, Any]) -> bool:
    """Whether the task or method that a value is of is in both settings."""
    return all(any(other[:2] == key[:2] for other in values) for values in (was, now))


def _told(key: Key) -> str:
    """As `budget of spt-lora`, `root of caltech101, final`."""
    if key[0] in _ADDED_TO and len(key) > 2:
        return f"{key[-1]} of {', '.join(key[1:-1])}"
    return ".".join(key)
