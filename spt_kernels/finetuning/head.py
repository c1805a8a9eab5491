"""The head of the model that is fine-tuned, for methods that no sensitivity tells of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..methods import Method
from ..sensitivity import find_head
from .pixels import Preprocessing


def with_head(method: Method, model: nn.Module, form: Preprocessing) -> Method:
    """`method`, told which layers of `model` come last, as one forward pass shows.

    One that has a head already, or chooses by a sensitivity, which knows of its own, is as it was.
    """
    if method.head is not None or method.is_sensitivity_aware:
        return method
    images = torch.zeros(2, *form.image_shape)
    return replace(method, head=find_head(model, [(images, torch.zeros(2, dtype=torch.int64))]))
