"""A tuned model found on disk: its task file, the base model it belongs to, its images."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..methods import tune
from ..methods.tunable import Tunable
from ..plan import Plan
from ..task import load_delta, merge
from ..task.file.format import read
from .head import with_head
from .job import FinetuneJob
from .models import ModelSource, build
from .pixels import Preprocessing
from .run_folder import FILES, RunFolder

SAVED = ("task", "trained", "model")  # what a run hands over, one of them


@dataclass(frozen=True)
class SavedRun:
    """What a run folder, or a task file alone, tells.

    Attributes:
        path: the task file; where the method has none, what it trained or the whole model.
        model: how to build the base model.
        num_classes: of the head.
        classes: their names, empty if unknown.
        form: the preprocessing, `None` if unknown.
        job: what was asked for, `None` if unknown.
    """

    path: Path
    model: ModelSource
    num_classes: int
    classes: tuple[str, ...] = ()
    form: Preprocessing | None = None
    job: FinetuneJob | None = None

    @classmethod
    def find(cls, path: str | os.PathLike[str], model: ModelSource | None = None) -> SavedRun:
        """Find out about a run folder or a task file.

        Args:
            path: the folder, or the file. A `config.json` beside the file is read.
            model: the base model; without it, the one in `config.json`.

        Raises:
            ValueError: no such file, or no way to know the base model.
        """
        path = Path(path)
        folder = RunFolder(path if path.is_dir() else path.parent)
        if path.is_dir():
            saved = [folder[name] for name in SAVED if folder[name].is_file()]
            if not saved:
                raise ValueError(f"{folder.path}: no {FILES['task']} in this folder")
            path = saved[0]
        elif not path.is_file():
            raise ValueError(f"no such file: {path}")
        config = folder.read_json("config")
        if config is None:
            if model is None:
                raise ValueError(
                    f"model: {path} has no {FILES['config']} beside it; name the base model"
                )
            return cls(path, model, _classes_of_head(path))
        job = FinetuneJob.from_json(config["job"])
        form: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config["preprocessing"].items()
        }
        classes = tuple(config["classes"])
        return cls(path, model or job.model, len(classes), classes, Preprocessing(**form), job)

    @property
    def is_whole_model(self) -> bool:
        """Whether `path` is a plain state dict, which needs no base weights."""
        return self.path.name == FILES["model"]

    def load(self) -> nn.Module:
        """Build the base model and put the task on it: a tuned model in evaluation mode.

        Raises:
            ValueError: the base model cannot be built.
            BaseModelMismatch: the task is of another base model.
            DeltaFormatError: the task file is damaged.
        """
        if self.is_whole_model:
            source = replace(self.model, weights=str(self.path), pretrained=False)
            return build(source, self.num_classes).model
        model = build(self.model, self.num_classes).model
        if self.path.name != FILES["trained"]:
            load_delta(model, self.path)
            return model.eval()
        return self._tuned(model).model.eval()

    def merged(self) -> nn.Module:
        """The plain model with what was learnt folded in; errors as `load`.

        Raises:
            ValueError: it cannot be folded in, or there is nothing to fold.
        """
        if self.is_whole_model:
            raise ValueError(f"{self.path} is a whole model already; there is nothing to merge")
        if self.path.name != FILES["trained"]:
            return merge(self.load())
        tunable = self._tuned(build(self.model, self.num_classes).model)
        if tunable.fold is None:
            raise ValueError(f"{self.path}: what this method trains cannot be merged")
        return tunable.fold(tunable.model.eval())

    def _tuned(self, model: nn.Module) -> Tunable:
        """A plain model tuned by the run's method once more, with what that trained."""
        if self.job is None or self.form is None:
            raise ValueError(
                f"{self.path} has no {FILES['config']} beside it, which tells the method"
            )
        plan = RunFolder(self.path.parent)["plan"]
        method = with_head(self.job.method, model, self.form)
        tunable = tune(model, method, Plan.load(plan) if plan.is_file() else None)
        tunable.load(self.path)
        return tunable


def _classes_of_head(path: Path) -> int:
    """Classes of the head in a task file: the rows of its last tensor, weight or bias."""
    task = read(path)
    heads = [task.dense[name] for name in task.plan.head if name in task.dense]
    if not heads:
        raise ValueError(f"{path}: the task file has no head, so its classes are unknown")
    return heads[-1].shape[0]
