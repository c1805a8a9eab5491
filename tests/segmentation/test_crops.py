"""The augmentation: labels go with their pixels, and the n-th square is always the same."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spt_kernels.segmentation import IGNORED, SceneForm, augmentation, read_ade20k
from spt_kernels.segmentation.augmentation import augmented
from spt_kernels.segmentation.crops import CropBatches

FORM = SceneForm((0.5, 0.25, 0.75), (0.5, 0.5, 0.5), size=32, stride=20)
CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_go_with_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "_distorted", lambda pixels, draw: pixels)
    labels = np.zeros((40, 48), dtype=np.uint8)
    labels[:, 20:] = 1
    labels[25:] = 2
    image = Image.fromarray(np.stack([labels * 100] * 3, axis=-1))
    mirrored, sizes = 0, set()
    for seed in range(40):
        pixels, target = augmented(image, labels, FORM, seeded(seed))
        assert (pixels.shape, target.shape) == ((3, 32, 32), (32, 32))
        inside = target != IGNORED
        expected = target[inside].float() * 100
        # the border of two classes is blurred by the interpolation of colours, not of labels
        assert ((pixels[0][inside].float() - expected).abs() < 30).float().mean() > 0.85
        outside = pixels[:, ~inside]
        assert (outside == torch.tensor([[128], [64], [191]])).all(), "the mean colour"
        top = target[0][target[0] != IGNORED].tolist()
        mirrored += 0 in top and 1 in top and top.index(1) < top.index(0)
        sizes.add(int(inside.sum()))
    assert mirrored > 3
    assert len(sizes) > 3, "smaller than the square at times"


def test_a_square_is_not_nearly_of_one_class() -> None:
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:, 50:] = 1  # the left half of the scene has no other class
    image, form = Image.new("RGB", (64, 64)), SceneForm((0.5,) * 3, (0.5,) * 3, 32, 20)
    shares = []
    for seed in range(60):
        target = augmented(image, labels, form, seeded(seed))[1]
        shares.append(float((target == 0).sum() / (target != IGNORED).sum()))
    # of squares drawn once, two thirds would be of one class here
    assert sum(share == 1 for share in shares) < 6


def test_colours_are_distorted_within_limits() -> None:
    grey = Image.new("RGB", (64, 64), (120, 120, 120))
    labels = np.zeros((64, 64), dtype=np.uint8)
    seen = {tuple(augmented(grey, labels, FORM, seeded(s))[0][:, 0, 0].tolist()) for s in range(50)}
    assert len(seen) > 20
    values = [value for colour in seen for value in colour]
    assert 35 <= min(values) < 100 < 140 < max(values) <= 232  # (120 ± 32) × 0.5 to 1.5


def batches(data: Path, **options: Any) -> CropBatches:
    return CropBatches(read_ade20k(data, "training"), FORM, 4, CPU, **options)


def test_what_comes_hangs_on_its_place_and_the_seed_alone(data: Path) -> None:
    whole = list(batches(data, seed=3).between(0, 4))
    later = list(batches(data, seed=3, workers=1).between(2, 4))
    for (images, labels), (others, other_labels) in zip(whole[2:], later, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    for seed in (4, 20261129_0617, 2**63 - 1):  # times a large number it has no room in 64 bits
        other = next(batches(data, seed=seed).between(0, 1))
        assert not torch.equal(whole[0][0], other[0])


def test_a_pass_has_every_scene_once(data: Path) -> None:
    crops = batches(data)._crops
    orders = [[crops.scene_at(n * 6 + place) for place in range(6)] for n in range(3)]
    assert [sorted(order) for order in orders] == [list(range(6))] * 3
    assert orders[0] != orders[1]
    again = 6 + orders[1].index(orders[0][0])
    assert not torch.equal(crops[0][0], crops[again][0]), "another square of the same scene"
    assert [len(labels) for _, labels in batches(data)] == [4, 2]


def test_pixels_are_normalised_as_the_backbone_wants_them(data: Path) -> None:
    images, labels = next(batches(data).between(0, 1))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    pixels, _ = batches(data)._crops[0]
    expected = (pixels / 255 - torch.tensor(FORM.mean).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(images[0], expected)


def test_a_file_that_is_damaged_by_then_is_named_by_a_process_that_ends(
    data: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(data, tmp_path / "scenes")
    scenes = read_ade20k(root, "training")
    for path in scenes.paths:
        path.write_bytes(b"none")
    gc.disable()  # which would end the process, in time
    try:
        with pytest.raises(ValueError, match=r"^/[^\n]*: cannot read the image \([^\n]*\)$"):
            next(CropBatches(scenes, FORM, 2, CPU, workers=1).between(0, 1))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()
