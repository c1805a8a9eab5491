"""A segmentation model found on disk: its file, the backbone it belongs to, its scenes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from ..errors import DeltaFormatError
from ..finetuning.base.models import ModelSource
from ..finetuning.folder.run_folder import RunFolder
from ..finetuning.run.description import kind_of, metadata_of
from ..finetuning.run.saved_run import saved_file
from ..methods import tune
from ..methods.tunable import Tunable
from ..plan import Plan
from ..task import load_delta, merge
from .description import KIND, SegmentationDescription
from .setr import Setr


@dataclass(frozen=True)
class SavedSegmentation:
    """What a segmentation run's folder, or a file of one that came alone, tells.

    Attributes:
        path: the task file; where the method has none, what it trained or the whole model.
        told: what the file tells of the model.
        data: the folder of its scenes, `None` if unknown.
        amp: the precision that its run was tested in, `"none"` where no run is known.
    """

    path: Path
    told: SegmentationDescription
    data: str | None = None
    amp: str = "none"

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
        metadata = metadata_of(path)
        if KIND not in metadata:
            raise ValueError(f"{path} is not of a model that labels pixels")
        try:
            found = cls(path, SegmentationDescription.from_json(metadata))
        except ValueError as error:
            raise DeltaFormatError(f"{path}: its metadata: {error}") from error
        if weights is not None:
            if found.is_whole_model:
                raise ValueError(
                    f"weights: {path} is a whole model, which needs no other; leave it out"
                )
            found = found.on(replace(found.model, weights=os.fspath(weights)))
        config = RunFolder(path.parent).read_config()
        if config is None or config.get("kind") != KIND:
            return found
        is_own = config.get("classes") == list(found.told.classes)
        if not is_own:
            return found
        job = config["job"]
        return replace(found, data=job["data"], amp=job["recipe"].get("amp", "none"))

    def on(self, model: ModelSource) -> SavedSegmentation:
        """The same with another backbone; weights from a file are not downloaded."""
        model = replace(model, pretrained=model.pretrained and model.weights is None)
        return replace(self, told=replace(self.told, model=model))

    @property
    def model(self) -> ModelSource:
        """How to build the backbone."""
        return self.told.model

    @property
    def num_classes(self) -> int:
        """Of a pixel."""
        return len(self.told.classes)

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
            model = self._plain().told.build().model
            try:
                model.load_state_dict(load_file(self.path))
            except RuntimeError as error:
                raise DeltaFormatError(f"{self.path}: is of another model: {error}") from error
            return model.eval()
        if source.weights is not None and not Path(source.weights).is_file():
            raise ValueError(
                f"weights: {self.path} is tuned from {source.weights}, which is not there; name "
                "the file"
            )
        model = self.told.build().model
        if kind_of(self.path) == "task":
            load_delta(model, self.path)
        else:
            self._tuned(model)
        return model.eval()

    def merged(self) -> Setr:
        """The plain model with what was learnt folded in; errors as `load`.

        Raises:
            ValueError: it cannot be folded in, or there is nothing to fold.
        """
        if self.is_whole_model:
            raise ValueError(f"{self.path} is a whole model already; there is nothing to merge")
        if kind_of(self.path) == "task":
            model = self.load()
            merge(model)
            return model
        model = self.told.build().model
        tunable = self._tuned(model)
        if tunable.fold is None:
            raise ValueError(f"{self.path}: what this method trains cannot be merged")
        tunable.fold(model.eval())
        return model

    def description(self) -> SegmentationDescription:
        """All that is told, to be told by a merged model, whose weights are its own."""
        return replace(self._plain().told, method=None)

    def _plain(self) -> SavedSegmentation:
        return self.on(replace(self.model, weights=None, pretrained=False))

    def _tuned(self, model: Setr) -> Tunable:
        """A plain model tuned by the run's method once more, with what that trained."""
        method = self.told.method
        if method is None:
            raise DeltaFormatError(f"{self.path} does not tell by which method it was trained")
        plan = RunFolder(self.path.parent)["plan"]
        if method.entry.holds is not None and not plan.is_file():
            raise ValueError(f"{self.path}: method {method.name!r} needs its {plan.name} beside it")
        tunable = tune(model, method, Plan.load(plan) if plan.is_file() else None)
        tunable.load(self.path)
        return tunable


def is_segmentation(path: str | os.PathLike[str]) -> bool:
    """Whether a run folder, or a file of one, is of a model that labels pixels."""
    path = Path(path)
    if path.is_dir():
        config = RunFolder(path).read_config()
        return config is not None and config.get("kind") == KIND
    try:
        return path.is_file() and KIND in metadata_of(path)
    except (ValueError, DeltaFormatError):
        return False  # whoever reads it says what is wrong with it
