"""A segmentation model found on disk: its file, the backbone it belongs to, its scenes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..errors import DeltaFormatError
from ..finetuning.description import kind_of, metadata_of
from ..finetuning.models import ModelSource
from ..finetuning.run_folder import RunFolder
from ..finetuning.saved_run import saved_file
from ..methods import Method, tune
from ..plan import Plan
from ..task import load_delta
from .base_model import build_setr
from .form import SceneForm
from .job import KIND
from .setr import Setr


@dataclass(frozen=True)
class SavedSegmentation:
    """What a segmentation run's folder, or a file of one that came alone, tells.

    Attributes:
        path: the task file; where the method has none, what it trained or the whole model.
        model: how to build the backbone.
        classes: their names, in the order of the head.
        form: what happens to the pixels.
        channels: of the decoder.
        auxiliary: the blocks that auxiliary heads read.
        method: what was trained, where it takes that to read the values.
        data: the folder of its scenes, `None` if unknown.
    """

    path: Path
    model: ModelSource
    classes: tuple[str, ...]
    form: SceneForm
    channels: int
    auxiliary: tuple[int, ...]
    method: Method | None = None
    data: str | None = None

    @classmethod
    def find(
        cls, path: str | os.PathLike[str], *, weights: str | os.PathLike[str] | None = None
    ) -> SavedSegmentation:
        """Find out about a run folder, or one of the files that a run leaves.

        Args:
            path: the folder, or the file.
            weights: of the backbone, where they are no longer in the place that is told.

        Raises:
            ValueError: no such file, or it is of no segmentation.
            DeltaFormatError: the file is damaged, or what it tells is malformed.
        """
        path = saved_file(Path(path))
        told = metadata_of(path)
        if KIND not in told:
            raise ValueError(f"{path} is not of a model that labels pixels")
        try:
            found = cls._told(path, told)
        except (KeyError, TypeError, ValueError) as error:
            raise DeltaFormatError(f"{path}: its metadata: {error}") from error
        if weights is not None:
            if found.is_whole_model:
                raise ValueError(
                    f"weights: {path} is a whole model, which needs no other; leave it out"
                )
            model = replace(found.model, weights=os.fspath(weights), pretrained=False)
            found = replace(found, model=model)
        config = RunFolder(path.parent).read_json("config") or {}
        is_own = config.get("kind") == KIND and config.get("classes") == list(found.classes)
        return replace(found, data=config["job"]["data"]) if is_own else found

    @classmethod
    def _told(cls, path: Path, told: Mapping[str, Any]) -> SavedSegmentation:
        model, decoder, method = told["model"], told[KIND], told.get("method")
        if method is not None:
            method = Method(**method)
        return cls(
            path,
            ModelSource(model["name"], model["arguments"], model["weights"], model["pretrained"]),
            tuple(told["classes"]),
            SceneForm.from_json(told["preprocessing"]),
            int(decoder["channels"]),
            tuple(decoder["auxiliary"]),
            method,
        )

    @property
    def is_whole_model(self) -> bool:
        """Whether `path` is a plain state dict, which needs no base weights."""
        return kind_of(self.path) == "state-dict"

    def load(self) -> Setr:
        """Build the base model and put what was learnt on it: a model in evaluation mode.

        Raises:
            ValueError: the base model cannot be built, or its weights are not there.
            BaseModelMismatch: the file is of another base model.
            DeltaFormatError: the file is damaged.
        """
        source = self.model
        if self.is_whole_model:
            source = replace(source, weights=None, pretrained=False)
        elif source.weights is not None and not Path(source.weights).is_file():
            raise ValueError(
                f"weights: {self.path} is tuned from {source.weights}, which is not there; name "
                "the file"
            )
        model = build_setr(
            source,
            len(self.classes),
            self.form.size,
            channels=self.channels,
            auxiliary=self.auxiliary,
        ).model
        if self.is_whole_model:
            try:
                model.load_state_dict(load_file(self.path))
            except RuntimeError as error:
                raise DeltaFormatError(f"{self.path}: is of another model: {error}") from error
        elif kind_of(self.path) == "task":
            load_delta(model, self.path)
        else:
            self._tune(model)
        return model.eval()

    def _tune(self, model: Setr) -> None:
        """Tune a plain model by the run's method once more, with what that trained."""
        if self.method is None:
            raise DeltaFormatError(f"{self.path} does not tell by which method it was trained")
        plan = RunFolder(self.path.parent)["plan"]
        if self.method.entry.holds is not None and not plan.is_file():
            raise ValueError(
                f"{self.path}: method {self.method.name!r} needs its {plan.name} beside it"
            )
        tunable = tune(model, self.method, Plan.load(plan) if plan.is_file() else None)
        tunable.load(self.path)


def is_segmentation(path: str | os.PathLike[str]) -> bool:
    """Whether a run folder, or a file of one, is of a model that labels pixels."""
    path = Path(path)
    if path.is_dir():
        config = RunFolder(path).read_json("config")
        return config is not None and config.get("kind") == KIND
    try:
        return path.is_file() and KIND in metadata_of(path)
    except (ValueError, DeltaFormatError):
        return False  # whoever reads it says what is wrong with it
