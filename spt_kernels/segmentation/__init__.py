"""A class for every pixel: a ViT tuned under SETR's decoder, on folders laid out as ADE20K's.

Names load on first use, so that the command line can read `recipe` without waiting for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

_NAMES = {
    "ade20k": ("IGNORED", "LabelledScenes", "read_ade20k"),
    "base_model": ("SegmentationModel", "build_setr"),
    "description": ("SegmentationDescription",),
    "evaluation": ("SegmentationScores", "evaluate_scenes"),
    "form": ("SceneForm",),
    "iou": ("PixelCounts",),
    "job": ("SegmentationJob",),
    "loss": ("PixelLoss",),
    "pipeline": ("segment",),
    "prediction": ("LabelledImage", "label_images"),
    "recipe": ("SegmentationRecipe",),
    "saved": ("SavedSegmentation",),
    "setr": ("Setr",),
    "slide": ("label_map", "slide_scores"),
    "training": ("train_segmentation",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .ade20k import IGNORED as IGNORED
    from .ade20k import LabelledScenes as LabelledScenes
    from .ade20k import read_ade20k as read_ade20k
    from .base_model import SegmentationModel as SegmentationModel
    from .base_model import build_setr as build_setr
    from .description import SegmentationDescription as SegmentationDescription
    from .evaluation import SegmentationScores as SegmentationScores
    from .evaluation import evaluate_scenes as evaluate_scenes
    from .form import SceneForm as SceneForm
    from .iou import PixelCounts as PixelCounts
    from .job import SegmentationJob as SegmentationJob
    from .loss import PixelLoss as PixelLoss
    from .pipeline import segment as segment
    from .prediction import LabelledImage as LabelledImage
    from .prediction import label_images as label_images
    from .recipe import SegmentationRecipe as SegmentationRecipe
    from .saved import SavedSegmentation as SavedSegmentation
    from .setr import Setr as Setr
    from .slide import label_map as label_map
    from .slide import slide_scores as slide_scores
    from .training import train_segmentation as train_segmentation

__getattr__ = names_on_first_use(__name__, _HOME)
