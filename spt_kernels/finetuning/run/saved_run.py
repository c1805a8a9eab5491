"""A tuned model found on disk: its task file, the base model it belongs to, its images."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ...methods import Method, tune
from ...methods.tunable import Tunable
from ...model import head_names
from ...plan import Plan
from ...task import load_delta, merge
from ...task.file.format import read
from ..base.head import with_head
from ..base.models import ModelSource, build, build_empty
from ..base.weight_file import read_state_dicts
from ..folder.run_folder import FILES, RunFolder
from ..images.pixels import Preprocessing
from ..job.job import FinetuneJob
from .description import SEGMENTATION, Description, form_of, kind_of, metadata_of

SAVED = ("task", "trained", "model")  # what a run hands over, one of them


@dataclass(frozen=True)
class SavedRun:
    """What a run folder, or a file of one that came alone, tells.

    Attributes:
        path: the task file; where the method has none, what it trained or the whole model.
        model: how to build the base model.
        num_classes: of the head.
        classes: their names in the order of the head, empty if unknown.
        form: the preprocessing, `None` if unknown.
        method: what was trained, `None` if unknown.
        job: what was asked for, `None` if unknown.
    """

    path: Path
    model: ModelSource
    num_classes: int
    classes: tuple[str, ...] = ()
    form: Preprocessing | None = None
    method: Method | None = None
    job: FinetuneJob | None = None

    @classmethod
    def find(
        cls,
        path: str | os.PathLike[str],
        model: ModelSource | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
    ) -> SavedRun:
        """Find out about a run folder, or one of the files that a run leaves.

        What the file tells of itself comes first, then a `config.json` beside it.

        Args:
            path: the folder, or the file.
            model: the base model; without it, the one that is told.
            weights: those of the base model, where they are no longer in the place that is told.

        Raises:
            ValueError: no such file, or no way to know the base model.
            DeltaFormatError: the file is damaged.
        """
        path = saved_file(Path(path))
        if SEGMENTATION in metadata_of(path):
            raise ValueError(f"{path} labels pixels, not images")
        other = weights is not None or (
            model is not None and (model.weights is not None or model.pretrained)
        )
        if other and kind_of(path) == "state-dict":
            raise ValueError(
                f"weights: {path} is a whole model, which needs no other; leave it out"
            )
        told = Description.of(path)
        job = _job_beside(path, told)
        if job is not None and not told.classes:  # an older file tells nothing
            told = _in_config(RunFolder(path.parent))
        source = model or told.model or (None if job is None else job.model)
        if source is None:
            raise ValueError(f"model: {path} does not tell its base model; name it")
        if weights is not None:
            source = replace(source, weights=os.fspath(weights), pretrained=False)
        elif model is None:
            source = _with_weights_at_hand(source, path)
        num_classes = len(told.classes) or _classes_of_head(path, source)
        method = told.method or (None if job is None else job.method)
        return cls(path, source, num_classes, told.classes, told.form, method, job)

    @property
    def is_whole_model(self) -> bool:
        """Whether `path` is a plain state dict, which needs no base weights."""
        return kind_of(self.path) == "state-dict"

    @property
    def amp(self) -> str:
        """The precision that its run was tested in; `"none"` where no run is known."""
        return "none" if self.job is None else self.job.recipe.amp

    def load(self) -> nn.Module:
        """Build the base model and put the task on it: a tuned model in evaluation mode.

        Raises:
            ValueError: the base model cannot be built.
            BaseModelMismatch: the task is of another base model.
            DeltaFormatError: the task file is damaged.
        """
        if self.is_whole_model:
            source = replace(self.model, weights=str(self.path), pretrained=False)
            built = build(replace(source, new_head=False), self.num_classes)
            if built.head_is_new:
                raise ValueError(f"{self.path}: its head is not of {self.num_classes} classes")
            return built.model
        model = self._base()
        if kind_of(self.path) == "task":
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
        if kind_of(self.path) == "task":
            return merge(self.load())
        tunable = self._tuned(self._base())
        if tunable.fold is None:
            raise ValueError(f"{self.path}: what this method trains cannot be merged")
        return tunable.fold(tunable.model.eval())

    def description(self) -> Description:
        """All that is told, to be told by a merged model, whose weights are its own."""
        model = replace(self.model, weights=None, pretrained=False)
        return Description(model, self.classes, self.form)

    def _base(self) -> nn.Module:
        weights = self.model.weights
        if weights is not None and not Path(weights).is_file():
            raise ValueError(
                f"weights: {self.path} is tuned from {weights}, which is not there; name the file"
            )
        return build(self.model, self.num_classes).model

    def _tuned(self, model: nn.Module) -> Tunable:
        """A plain model tuned by the run's method once more, with what that trained."""
        if self.method is None or self.form is None:
            raise ValueError(f"{self.path} does not tell by which method it was trained")
        plan = RunFolder(self.path.parent)["plan"]
        if self.method.entry.holds is not None and not plan.is_file():
            raise ValueError(
                f"{self.path}: method {self.method.name!r} needs its {plan.name} beside it"
            )
        method = with_head(self.method, model, self.form)
        tunable = tune(model, method, Plan.load(plan) if plan.is_file() else None)
        tunable.load(self.path)
        return tunable


def saved_file(path: Path) -> Path:
    """What a folder's run handed over, or the file itself."""
    if path.is_dir():
        folder = RunFolder(path)
        saved = [folder[name] for name in SAVED if folder[name].is_file()]
        if not saved:
            raise ValueError(f"{folder.path}: no {FILES['task']} in this folder")
        return saved[0]
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


def _job_beside(path: Path, told: Description) -> FinetuneJob | None:
    """The job of the run whose folder the file is in; not that of another run's folder."""
    folder = RunFolder(path.parent)
    config = folder.read_config()
    if config is None:
        return None
    own = _in_config(folder)
    if told.classes and (own.classes, own.form) != (told.classes, told.form):
        return None
    return folder.job_of(config, FinetuneJob.from_json)


def _in_config(folder: RunFolder) -> Description:
    """What the `config.json` of a run tells."""
    config = folder.read_config()
    assert config is not None
    job = folder.job_of(config, FinetuneJob.from_json)
    try:
        form = form_of(config["preprocessing"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder['config']}: its preprocessing: {error}") from error
    return Description(job.model, tuple(config["classes"]), form, job.method)


def _with_weights_at_hand(source: ModelSource, path: Path) -> ModelSource:
    """The base weights where they were, or, under the same name, beside the file."""
    if source.weights is None or Path(source.weights).is_file():
        return source
    beside = path.parent / Path(source.weights).name
    return replace(source, weights=str(beside)) if beside.is_file() else source


def _classes_of_head(path: Path, source: ModelSource) -> int:
    """Classes of the head in a file: the rows of its last tensor, weight or bias."""
    kind = kind_of(path)
    if kind == "task":
        task = read(path)
        shapes = [task.dense[name].shape for name in task.plan.head if name in task.dense]
    elif kind == "state-dict":
        return _rows_of_head(path, source)
    else:
        raise ValueError(f"{path} does not tell its classes")
    if not shapes:
        raise ValueError(f"{path}: there is no head in it, so its classes are unknown")
    return int(shapes[-1][0])


def _rows_of_head(path: Path, model: ModelSource) -> int:
    """Classes of the head in a state dict: the rows of what the model's head is called."""
    heads = head_names(build_empty(model, 2)[0])
    for tensors in read_state_dicts(path).values():
        for name, tensor in tensors.items():
            if tensor.ndim and any(name == head or name.endswith(f".{head}") for head in heads):
                return len(tensor)
    raise ValueError(f"{path} has no head of {model.name}, so its classes are unknown")
