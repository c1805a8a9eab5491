"""Fine-tuning of a timm model on images, as the command line does it and as Python can call it.

Names load on first use, so that the command line can read `recipe` without waiting for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

_NAMES = {
    "accuracy": ("Accuracy", "evaluate"),
    "comparison": ("ComparedWay", "Comparison", "compare_runs"),
    "comparison_chart": ("comparison_figure",),
    "confusion": ("confusion_figure",),
    "description": ("Description",),
    "evaluation": ("evaluate_saved", "images_of"),
    "job": ("FinetuneJob",),
    "models": ("ModelSource", "build"),
    "pipeline": ("finetune",),
    "pixels": ("Batches", "PixelSet", "Preprocessing"),
    "prediction": ("Prediction", "predict"),
    "presets": ("PRESETS", "Preset", "preset_of"),
    ".methods": ("METHODS", "Method"),  # of the package around this one
    "recipe": ("Recipe",),
    "saved_run": ("SavedRun",),
    "splits": ("ImageSource", "read_splits"),
    "training": ("train",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from ..methods import METHODS as METHODS
    from ..methods import Method as Method
    from .accuracy import Accuracy as Accuracy
    from .accuracy import evaluate as evaluate
    from .comparison import ComparedWay as ComparedWay
    from .comparison import Comparison as Comparison
    from .comparison import compare_runs as compare_runs
    from .comparison_chart import comparison_figure as comparison_figure
    from .confusion import confusion_figure as confusion_figure
    from .description import Description as Description
    from .evaluation import evaluate_saved as evaluate_saved
    from .evaluation import images_of as images_of
    from .job import FinetuneJob as FinetuneJob
    from .models import ModelSource as ModelSource
    from .models import build as build
    from .pipeline import finetune as finetune
    from .pixels import Batches as Batches
    from .pixels import PixelSet as PixelSet
    from .pixels import Preprocessing as Preprocessing
    from .prediction import Prediction as Prediction
    from .prediction import predict as predict
    from .presets import PRESETS as PRESETS
    from .presets import Preset as Preset
    from .presets import preset_of as preset_of
    from .recipe import Recipe as Recipe
    from .saved_run import SavedRun as SavedRun
    from .splits import ImageSource as ImageSource
    from .splits import read_splits as read_splits
    from .training import train as train

__getattr__ = names_on_first_use(__name__, _HOME)
