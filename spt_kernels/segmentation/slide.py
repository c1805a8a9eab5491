"""Scores of an image of any size by a model that sees windows of one size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import needed
from ..finetuning.device import autocast
from ..finetuning.training.accuracy import no_scores
from .form import SceneForm
from .scenes import as_pixels, normalised

with needed("reading images"):
    from PIL import Image

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale inference, as SETR's
_AT_ONCE = 1 << 26  # scores of an image, 256 MiB
Model = Callable[[Tensor], Tensor]


def in_precision(model: Model, device: torch.device, amp: str) -> Model:
    """The model under bf16 autocast, if `amp` says so."""

    def scores_of(images: Tensor) -> Tensor:
        with autocast(device, amp):
            return model(images)

    return scores_of


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` begin on `length` pixels: the last ends where the image does."""
    room = max(length - size, 0)
    return [min(i * stride, room) for i in range(-(-room // stride) + 1)]


@torch.no_grad()
def slide_scores(
    model: Model, images: Tensor, size: int, stride: int, *, at_once: int = 4
) -> Tensor:
    """Average the scores of all windows that cover each pixel.

    A side on which an image is smaller than a window is seen whole.

    Args:
        model: takes `[B, 3, height, width]`, gives `[B, classes, height, width]`.
        images: `[B, 3, height, width]`.
        size: side of a window.
        stride: pixels from one to the next.
        at_once: so many windows go through the model together.

    Returns:
        `[B, classes, height, width]`, fp32.

    Raises:
        FloatingPointError: scores are NaN, of which none is the highest.
    """
    if not 0 < stride <= size:
        raise ValueError(f"stride: expected 1 to the {size} pixels of a window, got {stride}")
    height, width = images.shape[-2:]
    rows, columns = min(size, height), min(size, width)
    corners = [
        (top, left)
        for top in window_starts(height, size, stride)
        for left in window_starts(width, size, stride)
    ]
    total: Tensor | None = None
    count = images.new_zeros(1, 1, height, width, dtype=torch.float32)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        windows = [images[..., top : top + rows, left : left + columns] for top, left in some]
        scores = model(torch.cat(windows)).float()
        if total is None:
            total = scores.new_zeros(len(images), scores.shape[1], height, width)
        for (top, left), own in zip(some, scores.split(len(images)), strict=True):
            total[..., top : top + rows, left : left + columns] += own
            count[..., top : top + rows, left : left + columns] += 1
    assert total is not None
    if total.isnan().any():
        raise no_scores("a part of an image")
    return total.div_(count)


@torch.no_grad()
def label_map(
    model: Model,
    image: Image.Image,
    form: SceneForm,
    device: torch.device,
    *,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """The most probable class of every pixel of an image.

    Args:
        model: in evaluation mode, on `device`.
        image: in RGB, of any size.
        form: how it is brought to the model.
        device: of the model.
        ratios: sizes to look at it in, as shares of the usual one; the probabilities are averaged.
        flip: look at its mirror image as well.

    Returns:
        int64 `[height, width]` on the device.
    """
    if not ratios:
        raise ValueError("ratios: expected at least one, got none")
    looks = (False, True) if flip else (False,)
    is_one = len(ratios) * len(looks) == 1
    averaged = _Averaged(image.height, image.width)
    for ratio in ratios:
        height, width = form.scaled(image.height, image.width, ratio)
        scaled = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = normalised(as_pixels(scaled)[None].to(device), form)
        for mirrored in looks:
            seen = pixels.flip(-1) if mirrored else pixels
            scores = slide_scores(model, seen, form.size, form.stride)
            scores = scores.flip(-1) if mirrored else scores
            if is_one:  # scores are in the order of their probabilities
                return _highest(scores, image.height, image.width)[0]
            averaged.add(scores)
            del scores  # or it stays while the next ones are made
    return averaged.highest()


def _highest(scores: Tensor, height: int, width: int) -> Tensor:
    """The class with the highest score at each pixel, of scores `[B, classes, …]` in another size.

    Of a photograph of 12 megapixels and 150 classes the scores are 7 GB: so few classes as fit are
    looked at together, among equals the first.
    """
    parts = min(scores.shape[1], -(-scores.shape[1] * height * width // _AT_ONCE))
    highest: Tensor | None = None
    first = 0
    for some in scores.tensor_split(parts, 1):
        values, places = _resized(some, height, width).max(1)
        if highest is None:
            highest, chosen = values, places
        else:
            is_higher = values > highest
            highest = torch.where(is_higher, values, highest)
            chosen = torch.where(is_higher, places + first, chosen)
        first += some.shape[1]
    return chosen


class _Averaged:
    """The probabilities of an image's pixels, summed over scores in other sizes.

    Those of a photograph of 12 megapixels and 150 classes are 7 GB. Held is what is less: the sum,
    or the scores that it is of. All else is made of some rows at a time.
    """

    def __init__(self, height: int, width: int) -> None:
        self._size = height, width
        self._sum: Tensor | None = None  # [1, classes, height, width]
        self._scores: list[Tensor] = []  # that are not in it yet

    def add(self, scores: Tensor) -> None:
        """Take scores `[1, classes, …]` in a size of their own."""
        height, width = self._size
        self._scores.append(scores)
        numel = scores.shape[1] * height * width
        if sum(own.numel() for own in self._scores) > numel:
            if self._sum is None:
                self._sum = scores.new_zeros(1, scores.shape[1], height, width)
            for rows in self._parts(scores.shape[1]):
                self._add_rows(self._sum[..., rows, :], rows)
            self._scores.clear()

    def highest(self) -> Tensor:
        """The most probable class of every pixel, `[height, width]`."""
        n_classes = (self._scores[0] if self._sum is None else self._sum).shape[1]
        labels = []
        for rows in self._parts(n_classes):
            if self._sum is None:
                shape = 1, n_classes, rows.stop - rows.start, self._size[1]
                total = self._scores[0].new_zeros(shape)
            else:
                total = self._sum[..., rows, :]
            self._add_rows(total, rows)
            labels.append(total[0].argmax(0))
        return torch.cat(labels)

    def _add_rows(self, total: Tensor, rows: slice) -> None:
        for scores in self._scores:
            total += _resized_rows(scores, *self._size, rows).softmax(1)

    def _parts(self, n_classes: int) -> list[slice]:
        """Rows that are looked at together: all where these are few."""
        height, width = self._size
        parts = min(height, -(-n_classes * height * width // _AT_ONCE))
        if parts > 1:  # each is there three times over
            parts = min(height, 4 * parts)
        edges = [height * i // parts for i in range(parts + 1)]
        return [slice(*pair) for pair in itertools.pairwise(edges)]


def _resized_rows(scores: Tensor, height: int, width: int, rows: slice) -> Tensor:
    """Some rows of `_resized`, up to rounding, in the memory of these."""
    own = scores.shape[-2]
    if rows == slice(0, height):
        return _resized(scores, height, width)
    # as there, in fp32, of which the place is rounded once
    step = torch.tensor(own / height, dtype=torch.float32, device="cpu").double()
    place = torch.arange(rows.start, rows.stop, dtype=torch.float64, device="cpu")
    place = ((place + 0.5) * step - 0.5).float().clamp_(min=0)
    above = place.long().clamp_(max=own - 1)
    below = (above + 1).clamp_(max=own - 1)
    share = (place - above)[:, None].to(scores.device)
    first, last = int(above[0]), int(below[-1])
    wide = _resized(scores[..., first : last + 1, :], last + 1 - first, width)
    # by indexing: on a CPU, `index_select` of such a dimension takes many times as long
    upper = wide[..., above - first, :].mul_(1 - share)
    return upper.addcmul_(wide[..., below - first, :], share)


def _resized(scores: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=False)
