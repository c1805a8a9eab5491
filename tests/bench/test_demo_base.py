"""The demo's base model can be trained again, and what it is trained on."""

from __future__ import annotations

import torch
from safetensors.torch import save

from bench import demo_base


def test_one_seed_gives_the_same_file() -> None:
    files = [save(demo_base.shipped(demo_base.train(1))) for _ in range(2)]
    assert files[0] == files[1]


def test_the_head_that_is_shipped_is_that_of_upright_digits() -> None:
    images = torch.arange(8.0).view(1, 1, 2, 4).expand(2, 1, 2, 4)
    every, labels = demo_base.turned(images[..., :2], torch.tensor([3, 4]))
    assert labels.tolist() == [3, 4, 8, 9, 13, 14, 18, 19]
    torch.testing.assert_close(every[:2], images[..., :2])
    assert demo_base.digits("train")[1].unique().tolist() == [0, 1, 2, 3, 4]


def test_images_stay_in_their_place_on_average() -> None:
    """Nothing is drawn that turns a digit over or moves it out of the picture."""
    torch.manual_seed(0)
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., 3:5, 3:5] = 1.0  # a dot in the middle
    mean = demo_base.varied(image.expand(400, 1, 8, 8)).mean(0)[0]
    assert mean[3:5, 3:5].min() > mean[:2].max() + 0.3
    assert mean[0].max() < -0.9
