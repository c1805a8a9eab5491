"""What a saved model takes each pixel of new images for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..finetuning.device import pick_device
from ..finetuning.progress import Progress, Silent
from ..finetuning.results.prediction import find_images
from .pictures import check_names, save_prediction
from .reading import images_of
from .saved import SavedSegmentation
from .slide import RATIOS, in_precision, label_map


@dataclass(frozen=True)
class LabelledImage:
    """What is on an image.

    Attributes:
        image: the file.
        shares: of the pixels, in 0 to 1, by class: the largest first, those alone that are there.
    """

    image: Path
    shares: dict[str, float]


def label_images(
    saved: SavedSegmentation,
    images: Iterable[str | os.PathLike[str]],
    save_to: str | os.PathLike[str],
    *,
    multi_scale: bool = False,
    ratios: Sequence[float] = RATIOS,
    amp: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> list[LabelledImage]:
    """Write label maps of images, in their own size.

    Args:
        saved: the model.
        images: files, and folders of them.
        save_to: a folder for `<image>.png`, whose values are 1 more than the class, and
            `<image>-overlay.png`; older files of these names are replaced.
        multi_scale: look at `ratios` of the usual size and the mirror images as well.
        ratios: see there.
        amp: `"none"` or `"bf16"`; `None` is the precision that the run was tested in.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that read images; 0 reads in this one.
        progress: told of every image.

    Raises:
        ValueError: there are no images, one cannot be read, what is written would have one name
            twice, or that of an image that is read; or as `SavedSegmentation.load`.
    """
    progress = progress or Silent()
    place, folder = pick_device(device), Path(save_to)
    paths = find_images(images)
    check_names(paths, folder)
    model = in_precision(saved.load().to(place), place, saved.amp if amp is None else amp)
    form, classes = saved.told.form, saved.told.classes
    looks = {"ratios": ratios, "flip": True} if multi_scale else {}
    progress.start("labelling", len(paths))
    found = []
    for path, image in zip(paths, images_of(paths, workers), strict=True):
        labels = label_map(model, image, form, place, **looks).cpu()  # type: ignore[arg-type]
        save_prediction(folder, path.stem, image, labels.numpy(), len(classes))
        counts = labels.flatten().bincount(minlength=len(classes)).tolist()
        order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: (-counts[i], i))
        found.append(LabelledImage(path, {classes[i]: counts[i] / labels.numel() for i in order}))
        progress.advance()
    return found
