"""Fine-tuning of a timm model on images, as the command line does it and as Python can call it.

Names load on first use, so that the command line can read `recipe` without waiting for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

_NAMES = {
    "training.accuracy": ("Accuracy", "evaluate"),
    "results.comparison": ("ComparedWay", "Comparison", "compare_runs"),
    "results.comparison_chart": ("comparison_figure",),
    "results.confusion": ("confusion_figure",),
    "run.description": ("Description",),
    "results.evaluation": ("evaluate_saved", "images_of"),
    "job.job": ("FinetuneJob",),
    "base.models": ("ModelSource", "build"),
    "pipeline": ("finetune",),
    "images.pixels": ("Batches", "PixelSet", "Preprocessing"),
    "results.prediction": ("Prediction", "predict"),
    "job.presets": ("PRESETS", "Preset", "preset_of"),
    ".methods": ("METHODS", "Method"),  # of the package around this one
    "job.recipe": ("Recipe",),
    "run.saved_run": ("SavedRun",),
    "images.splits": ("ImageSource", "read_splits"),
    "training.loop": ("train",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from ..methods import METHODS as METHODS
    from ..methods import Method as Method
    from .base.models import ModelSource as ModelSource
    from .base.models import build as build
    from .images.pixels import Batches as Batches
    from .images.pixels import PixelSet as PixelSet
    from .images.pixels import Preprocessing as Preprocessing
    from .images.splits import ImageSource as ImageSource
    from .images.splits import read_splits as read_splits
    from .job.job import FinetuneJob as FinetuneJob
    from .job.presets import PRESETS as PRESETS
    from .job.presets import Preset as Preset
    from .job.presets import preset_of as preset_of
    from .job.recipe import Recipe as Recipe
    from .pipeline import finetune as finetune
    from .results.comparison import ComparedWay as ComparedWay
    from .results.comparison import Comparison as Comparison
    from .results.comparison import compare_runs as compare_runs
    from .results.comparison_chart import comparison_figure as comparison_figure
    from .results.confusion import confusion_figure as confusion_figure
    from .results.evaluation import evaluate_saved as evaluate_saved
    from .results.evaluation import images_of as images_of
    from .results.prediction import Prediction as Prediction
    from .results.prediction import predict as predict
    from .run.description import Description as Description
    from .run.saved_run import SavedRun as SavedRun
    from .training.accuracy import Accuracy as Accuracy
    from .training.accuracy import evaluate as evaluate
    from .training.loop import train as train

__getattr__ = names_on_first_use(__name__, _HOME)
