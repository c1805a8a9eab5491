"""Convolutions of any geometry, drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn


def draw(seed: int) -> tuple[nn.Conv2d, Tensor]:
    """A convolution and an input of three samples for it."""
    chosen = random.Random(seed)
    groups = chosen.choice([1, 1, 2, 3, 6])
    options: dict[str, Any] = {
        "kernel_size": (chosen.randint(1, 4), chosen.randint(1, 4)),
        "dilation": (chosen.randint(1, 3), chosen.randint(1, 3)),
        "groups": groups,
        "bias": chosen.random() < 0.7,
        "padding_mode": chosen.choice(["zeros", "zeros", "reflect", "replicate", "circular"]),
    }
    way = chosen.choice(["strided", "patches", "same", "valid"])
    if way == "patches":
        options |= {"stride": options["kernel_size"]}
    elif way == "strided":
        options |= {
            "stride": (chosen.randint(1, 3), chosen.randint(1, 3)),
            "padding": (chosen.randint(0, 3), chosen.randint(0, 3)),
        }
    else:
        options |= {"padding": way}
    torch.manual_seed(seed)
    out_channels = groups * chosen.randint(1, 3)
    conv = nn.Conv2d(6, out_channels, **options)
    size = chosen.randint(11, 14), chosen.randint(11, 14)
    return conv, torch.randn(3, 6, *size)
