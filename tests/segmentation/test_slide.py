"""Sliding windows: against a loop over pixels, and the whole image where one window covers it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spt_kernels.segmentation import SceneForm, label_map, slide, slide_scores
from spt_kernels.segmentation.slide import window_starts

CPU = torch.device("cpu")


class Around(nn.Module):
    """Scores that hang on where a pixel lies in its window."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).cumsum(-1).sin()


@pytest.mark.parametrize(
    ("height", "width", "size", "stride"),
    [(40, 48, 16, 10), (17, 33, 16, 16), (31, 20, 12, 5), (9, 30, 16, 10), (16, 16, 16, 3)],
)
def test_every_pixel_has_the_mean_of_its_windows(
    height: int, width: int, size: int, stride: int
) -> None:
    model, images = Around(), torch.randn(2, 3, height, width)
    total, count = torch.zeros(2, 4, height, width), torch.zeros(height, width)
    tops = range(0, max(height - size, 0) + stride, stride)
    lefts = range(0, max(width - size, 0) + stride, stride)
    with torch.no_grad():
        for top in tops:
            for left in lefts:
                y, x = min(top, max(height - size, 0)), min(left, max(width - size, 0))
                part = images[..., y : y + size, x : x + size]
                scores = model(part)
                for row in range(part.shape[-2]):
                    for column in range(part.shape[-1]):
                        total[..., y + row, x + column] += scores[..., row, column]
                        count[y + row, x + column] += 1
    assert count.min() >= 1
    for at_once in (1, 3):
        found = slide_scores(model, images, size, stride, at_once=at_once)
        torch.testing.assert_close(found, total / count)


def test_one_window_is_the_whole_image() -> None:
    model, images = Around(), torch.randn(1, 3, 11, 14)
    with torch.no_grad():
        assert torch.equal(slide_scores(model, images, 14, 9), model(images))


def test_windows_end_where_the_image_does() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]
    assert window_starts(100, 512, 341) == [0]
    with pytest.raises(ValueError, match=r"^stride: expected 1 to the 8 pixels of a window, got 9"):
        slide_scores(Around(), torch.randn(1, 3, 8, 8), 8, 9)


def image_of(height: int, width: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_several_looks_are_averaged_by_their_probabilities() -> None:
    model, image, form = Around(), image_of(20, 30), SceneForm((0.5,) * 3, (0.5,) * 3, 16, 16)
    ratios = (0.5, 1.0, 1.75)
    mean = torch.zeros(4, 20, 30)
    with torch.no_grad():
        for ratio in ratios:
            height, width = round(16 * ratio), round(24 * ratio)
            assert form.scaled(20, 30, ratio) == (height, width)
            scaled = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = torch.tensor(np.array(scaled)).permute(2, 0, 1)
            seen = ((pixels / 255 - 0.5) / 0.5)[None]
            for mirrored in (False, True):
                look = seen.flip(-1) if mirrored else seen
                scores = slide_scores(model, look, 16, 16)
                scores = scores.flip(-1) if mirrored else scores
                large = F.interpolate(scores, (20, 30), mode="bilinear", align_corners=False)
                mean += large[0].softmax(0)
    found = label_map(model, image, form, CPU, ratios=ratios, flip=True)
    assert (found == mean.argmax(0)).float().mean() > 0.99  # ties of roundings aside


def test_a_label_map_is_as_large_as_its_image() -> None:
    form = SceneForm((0.5,) * 3, (0.5,) * 3, 16, 10)
    for height, width in ((9, 50), (16, 16), (70, 12)):
        assert label_map(Around(), image_of(height, width), form, CPU).shape == (height, width)
    assert form.scaled(10, 100) == (6, 64), "a long image is no longer than four windows"
    with pytest.raises(ValueError, match=r"^ratios: expected at least one"):
        label_map(Around(), image_of(9, 9), form, CPU, ratios=())


def test_a_large_image_is_labelled_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = torch.randn(7, 3, 3, 3)
    weights[4] = weights[1]  # equals, of which the first counts
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    form = SceneForm((0.5,) * 3, (0.5,) * 3, 16, 10)

    def model(images: Tensor) -> Tensor:
        return F.conv2d(images, weights, padding=1)

    whole = label_map(model, image, form, CPU)
    assert 1 in whole
    assert 4 not in whole
    scaled: list[int] = []
    interpolate = F.interpolate

    def watched(*args: Any, **named: Any) -> Tensor:
        made = interpolate(*args, **named)
        scaled.append(made.shape[1])
        return made

    monkeypatch.setattr(F, "interpolate", watched)
    for at_once, parts in ((50 * 70 * 7, [7]), (50 * 70 * 3, [3, 2, 2]), (1, [1] * 7)):
        scaled.clear()
        monkeypatch.setattr(slide, "_AT_ONCE", at_once)
        assert torch.equal(label_map(model, image, form, CPU), whole)
        assert scaled == parts


@pytest.mark.parametrize("size", [8, 40], ids=["scores_kept", "summed"])
def test_a_large_image_is_seen_in_several_sizes_in_little_memory(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, 3, padding=1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8))
    form = SceneForm((0.5,) * 3, (0.5,) * 3, size, size // 2)
    looks: dict[str, Any] = {"ratios": (0.5, 1.0, 1.5), "flip": True}
    with MostAtOnce() as before:
        whole = label_map(conv, image, form, CPU, **looks)
    monkeypatch.setattr(slide, "_AT_ONCE", 53 * 71)
    with MostAtOnce() as most:
        assert torch.equal(label_map(conv, image, form, CPU, **looks), whole)
    if size == 8:  # so that what it is seen in is less than the image
        assert before.numel == 53 * 71 * 7
        assert most.numel < 53 * 71


class MostAtOnce(TorchDispatchMode):
    """How many numbers the largest tensor has that any call gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype is torch.float32:
            self.numel = max(self.numel, made.numel())
        return made


def test_scores_that_are_no_numbers_are_an_error() -> None:
    image = Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8))
    form = SceneForm((0.5,) * 3, (0.5,) * 3, 16, 10)
    for looks in ({}, {"ratios": (0.5, 1.0), "flip": True}):
        with pytest.raises(FloatingPointError, match="scores are nan on a part of an image"):
            label_map(lambda images: images * torch.nan, image, form, CPU, **looks)
