"""What is tunable in a model, told without values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model import HeadPatterns
from ..sensitivity import Share, account_of
from .step import forward_of, on_its_own
from .twin import fake_copy


@on_its_own()
def tunable_parts(
    model: nn.Module, image_shape: Sequence[int], *, head: HeadPatterns | None = None
) -> tuple[Share, ...]:
    """Tell of every kind of parameter how it is measured, what may be put on it, what is frozen.

    Args:
        model: plain, of timm, transformers or one's own; not changed. A copy without values is
            made, which its attributes must allow. Its parameters may be on the meta device.
        image_shape: of one input, `(3, height, width)`.
        head: as `measure_sensitivity` has it; by name, unless it is given.

    Raises:
        ValueError: the model has nothing to tune, or cannot take such images.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    twin, _alive = fake_copy(model, fakes, torch.float32)
    twin.eval()
    with fakes:
        # a sample's activations ask for gradients as in a measurement, and constants do not
        batch = torch.empty((2, *image_shape)).requires_grad_(True)
        return account_of(twin, lambda: forward_of(twin, batch), head)
