"""The part of an image that is kept: beside torchvision's transforms, and what chance draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from spt_kernels.finetuning.images.kept_part import AUGMENTATIONS, Box, kept_part
from spt_kernels.finetuning.images.pixels import Preprocessing, decode

HALF = (0.5, 0.5, 0.5)
SHARE = 0.875  # 28 of 32


def drawn(
    size: tuple[int, int], augment: str, fit: str = "squash", count: int = 400
) -> list[tuple[Box, bool]]:
    generator = torch.Generator().manual_seed(0)
    return [kept_part(size, fit, SHARE, augment, generator) for _ in range(count)]


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_the_middle_is_that_of_torchvisions_resize_and_crop(tmp_path: Path, fit: str) -> None:
    ramp = np.add.outer(np.arange(96), 2 * np.arange(64)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp.T[:64].repeat(2, 0)[:96, :64], ramp], 2))
    image.save(tmp_path / "ramp.png")
    form = Preprocessing(28, HALF, HALF, fit=fit, crop_pct=SHARE)
    resize = transforms.Resize((32, 32) if fit == "squash" else 32, interpolation=3)
    theirs = transforms.Compose([resize, transforms.CenterCrop(28), transforms.PILToTensor()])
    gap = decode(tmp_path / "ramp.png", form).float() - theirs(image).float()
    assert gap.abs().mean() < 1.0  # of 255: they round between the two, we go in one
    whole = Preprocessing(28, HALF, HALF, fit=fit)
    apart = decode(tmp_path / "ramp.png", whole).float() - theirs(image).float()
    assert apart.abs().mean() > 3.0


@pytest.mark.parametrize("augment", AUGMENTATIONS[1:])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (300, 10)])
def test_what_is_drawn_lies_in_the_image(augment: str, size: tuple[int, int]) -> None:
    for (left, top, right, bottom), _ in drawn(size, augment):
        assert -1e-9 <= left < right <= size[0] + 1e-9
        assert -1e-9 <= top < bottom <= size[1] + 1e-9


@pytest.mark.parametrize(
    ("fit", "sides", "room"),
    [("squash", (35.0, 26.25), (5, 3.75)), ("crop", (26.25,) * 2, (13.75, 3.75))],
)
def test_a_window_of_the_resized_image_moves_everywhere(
    fit: str, sides: tuple[float, float], room: tuple[float, float]
) -> None:
    boxes = drawn((40, 30), "random-crop-flip", fit)
    assert all((r - x, b - y) == pytest.approx(sides) for (x, y, r, b), _ in boxes)
    for place, most in enumerate(room):
        starts = [box[place] for box, _ in boxes]
        assert min(starts) < 0.05 * most
        assert max(starts) > 0.95 * most
    assert 150 < sum(mirrored for _, mirrored in boxes) < 250


def test_resized_crops_are_spread_as_torchvisions() -> None:
    def spread(sides: list[tuple[float, float]]) -> torch.Tensor:
        width, height = torch.tensor(sides, dtype=torch.float64).unbind(1)
        figures = width * height / (400 * 300), (width / height).log()
        return torch.stack([part for f in figures for part in (f.mean(), f.std())])

    ours = [
        (r - x, b - y) for (x, y, r, b), _ in drawn((400, 300), "resized-crop-flip", count=2000)
    ]
    torch.manual_seed(0)
    blank = Image.new("L", (400, 300))
    theirs = [
        transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3])[2:][::-1]
        for _ in range(2000)
    ]
    assert torch.allclose(spread(ours), spread(theirs), atol=0.025)
    assert max(w * h for w, h in ours) > 0.95 * 400 * 300
    assert max(w / h for w, h in ours) == pytest.approx(4 / 3, rel=0.02)


def test_of_a_ribbon_as_much_of_its_middle_is_kept_as_may_be() -> None:
    ((left, top, right, bottom), _) = drawn((3000, 3), "resized-crop-flip", count=1)[0]
    assert (left, top, right, bottom) == pytest.approx((1498, 0, 1502, 3))
