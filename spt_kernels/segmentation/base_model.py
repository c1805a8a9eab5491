"""The segmentation model before tuning: a pre-trained ViT under a fresh decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import needed
from ..finetuning.base.models import ModelSource, build, build_empty
from .setr import Setr

with needed("building models by name"):
    import timm


@dataclass(frozen=True)
class SegmentationModel:
    """A model as it is before tuning.

    Attributes:
        model: in evaluation mode, on the CPU.
        mean: by which the backbone's images are normalised, of each colour.
        std: likewise.
        weight_notes: what of the file of weights was taken, changed, and left out.
    """

    model: Setr
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weight_notes: tuple[str, ...] = ()


def build_setr(
    source: ModelSource,
    num_classes: int,
    size: int,
    *,
    channels: int = 256,
    auxiliary: Sequence[int] | None = None,
    seed: int = 0,
    drop_path: float = 0.0,
) -> SegmentationModel:
    """Build SETR-PUP on the vision transformer of `source`, whose position embeddings are resized.

    Args:
        source: the backbone; its classifier is left out.
        num_classes: of a pixel.
        size: side of the squares that the model is to see; others are taken as well.
        channels: of the decoder's convolutions.
        auxiliary: as `Setr` has it.
        seed: of the decoder's initial values.
        drop_path: stochastic depth of the backbone.

    Raises:
        ValueError: as `build`, or it is no plain vision transformer for images of three colours, or
            `size` is less than one of its patches.
    """
    plain = {"dynamic_img_size": True, "img_size": size}
    sized = replace(source, args={**plain, **source.args})
    try:
        base = build(sized, 0, seed=seed, drop_path=drop_path)
    except ValueError as error:
        if any(f"{name}=" in str(error) for name in plain.keys() - source.args.keys()):
            raise ValueError(
                f"model: expected a plain vision transformer of timm, which takes images of any "
                f"size, as vit_base_patch16_224, got {source.name}"
            ) from error
        if "img_size" not in source.args:  # or weights are said to be of another model
            _check_size(build_empty(sized, 0)[0], size)
        raise
    if "img_size" not in source.args:
        _check_size(base.model, size)
    config = timm.data.resolve_model_data_config(base.model)
    if config["input_size"][0] != 3 or getattr(base.model, "in_chans", 3) != 3:
        raise ValueError(f"model: expected one that takes images of 3 colours, got {source.name}")
    torch.manual_seed(seed)
    model = Setr(base.model, num_classes, channels=channels, auxiliary=auxiliary)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return SegmentationModel(model.eval(), mean, std, base.weight_notes)


def _check_size(backbone: nn.Module, size: int) -> None:
    """Refuse squares that have not one whole patch: there is no position to embed."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and size < max(patch):
        rows, columns = patch
        raise ValueError(
            f"size: expected at least the {rows} × {columns} pixels of a patch, got {size}"
        )
