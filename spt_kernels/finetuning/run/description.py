"""What a saved file tells of itself beside its values: all that is needed to use it alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import DeltaFormatError
from ...files import checked_file
from ...methods import Method
from ...methods.tunable import IN_MODEL
from ...task import read_metadata
from ..base.models import ModelSource
from ..base.weight_file import is_safetensors, own_kind
from ..base.weight_file import metadata_of as header_of
from ..images.pixels import Preprocessing
from ..job.job import plain
from .setting import Setting

KEYS = ("model", "classes", "preprocessing", "method")  # of the metadata, what is said here
SEGMENTATION = "segmentation"  # of the metadata, in files of models that label pixels


@dataclass(frozen=True)
class Description:
    """What is needed to use a saved file alone; what it does not tell is `None` or empty.

    Attributes:
        model: how to build the base model. The path of the weights is that of the machine it was
            trained on.
        classes: their names, in the order of the head.
        form: the preprocessing of images.
        method: what was trained, where it takes that to read the values.
    """

    model: ModelSource | None = None
    classes: tuple[str, ...] = ()
    form: Preprocessing | None = None
    method: Method | None = None

    def to_json(self) -> dict[str, Any]:
        """As metadata for `save_delta`, which `of` reads."""
        told: dict[str, Any] = {}
        if self.model is not None:
            told["model"] = told_of(self.model)
        if self.classes:
            told["classes"] = self.classes
        if self.form is not None:
            told["preprocessing"] = {k: v for k, v in asdict(self.form).items() if k != "augment"}
        if self.method is not None:
            told["method"] = asdict(self.method)
        value: dict[str, Any] = plain(told)
        return value

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> Description:
        """What `to_json` wrote, or someone who wrote such metadata, which may hold more.

        Raises:
            ValueError: it is malformed.
        """
        try:
            model, form, method = (metadata.get(n) for n in ("model", "preprocessing", "method"))
            return cls(
                None if model is None else _model(**model),
                tuple(metadata.get("classes") or ()),
                None if form is None else form_of(form),
                # what is no object is not ours
                Method.from_json(method) if isinstance(method, dict) else None,
            )
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not the description of a model: {error}") from error

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Description:
        """What the file at `path` tells: a task, trained values, or a whole model.

        Raises:
            DeltaFormatError: it is none of these, or damaged, or what it tells is malformed.
        """
        told = metadata_of(path)
        try:
            return cls.from_json(told)
        except ValueError as error:
            raise DeltaFormatError(f"{os.fspath(path)}: its metadata: {error}") from error


def description_of(setting: Setting, file: str, method: Method) -> Description:
    """What a run's file tells; `file` is what `Tunable` calls it.

    A task has a plan, and a whole model is what it is: only what was trained hangs on the method.
    """
    job, classes = setting.job, setting.splits.train.classes
    return Description(job.model, classes, setting.form, method if file == "trained" else None)


def form_of(told: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that JSON values describe, among others; without augmentation.

    Raises:
        ValueError: a value is none that it can have, or the images would not be square.
        TypeError: one is missing, or of another type.
    """
    own = {f.name for f in fields(Preprocessing)} - {"augment"}
    values: dict[str, Any] = {
        n: tuple(v) if isinstance(v, list) else v for n, v in told.items() if n in own
    }
    if isinstance(values.get("size"), tuple):
        height, width = values["size"]
        if height != width:
            raise ValueError(f"preprocessing: expected square images, got {height} × {width}")
        values["size"] = height
    return Preprocessing(**values)


def as_header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as the header of a plain state dict holds it, where `metadata_of` finds it."""
    return {IN_MODEL: json.dumps(metadata)}


def kind_of(path: str | os.PathLike[str]) -> str:
    """A kind of `checked_file`, or `state-dict` for any other file of weights.

    Raises:
        ValueError: no such file, or a safetensors file that is cut or damaged.
    """
    return own_kind(path) or "state-dict"


def metadata_of(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """All metadata of a file that a run leaves, a user's own too.

    Raises:
        ValueError: it is no such file.
        DeltaFormatError: it is damaged.
    """
    path, kind = Path(path), kind_of(path)
    if kind == "task":
        return read_metadata(path)
    if kind == "trained":
        return checked_file.read(path, kind, lambda document, _: document.get("metadata", {}))
    if kind != "state-dict":
        raise ValueError(f"{path}: expected a task, trained values or a model, got a {kind}")
    if not is_safetensors(path):
        return {}  # torch's own files hold the values alone
    try:
        value = json.loads(header_of(path).get(IN_MODEL, "{}"))
    except ValueError as error:
        raise DeltaFormatError(f"{path}: its metadata are no JSON ({error})") from error
    if not isinstance(value, dict):
        raise DeltaFormatError(f"{path}: its metadata are no JSON object")
    return value


def told_of(model: ModelSource) -> dict[str, Any]:
    """How to build a model, as a file tells it."""
    return {
        "name": model.name,
        "arguments": dict(model.args),
        "weights": model.weights,
        "pretrained": model.pretrained,
    }


def _model(
    name: str,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    weights: str | None = None,
    pretrained: bool = False,
    **_more: Any,
) -> ModelSource:
    return ModelSource(name, dict(arguments), weights, pretrained)
