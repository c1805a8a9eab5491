"""Fine-tuning of a timm model on images, as the command line does it and as Python can call it.

Names load on first use, so that the command line can read `recipe` without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Accuracy": "accuracy",
    "evaluate": "accuracy",
    "FinetuneJob": "job",
    "ModelSource": "models",
    "build": "models",
    "finetune": "pipeline",
    "Batches": "pixels",
    "PixelSet": "pixels",
    "Preprocessing": "pixels",
    "METHODS": ".methods",  # of the package around this one
    "Method": ".methods",
    "Recipe": "recipe",
    "SavedRun": "saved_run",
    "ImageSource": "splits",
    "read_splits": "splits",
    "train": "training",
}

__all__ = [
    "METHODS",
    "Accuracy",
    "Batches",
    "FinetuneJob",
    "ImageSource",
    "Method",
    "ModelSource",
    "PixelSet",
    "Preprocessing",
    "Recipe",
    "SavedRun",
    "build",
    "evaluate",
    "finetune",
    "read_splits",
    "train",
]

if TYPE_CHECKING:
    from ..methods import METHODS, Method
    from .accuracy import Accuracy, evaluate
    from .job import FinetuneJob
    from .models import ModelSource, build
    from .pipeline import finetune
    from .pixels import Batches, PixelSet, Preprocessing
    from .recipe import Recipe
    from .saved_run import SavedRun
    from .splits import ImageSource, read_splits
    from .training import train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
