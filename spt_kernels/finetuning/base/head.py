"""The head of the model that is fine-tuned, for methods that no sensitivity tells of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ...methods import Method
from ...model import head_names
from ...model.head import layers_of
from ...plan import Plan
from ...sensitivity import Sensitivity, find_head
from ..images.pixels import Preprocessing


def with_head(method: Method, model: nn.Module, form: Preprocessing) -> Method:
    """`method`, told which layers of `model` come last, as one forward pass shows.

    One that has a head already, or chooses by a sensitivity, which knows of its own, is as it was.
    """
    if method.head is not None or method.is_sensitivity_aware:
        return method
    images = torch.zeros(2, *form.image_shape)
    return replace(method, head=find_head(model, [(images, torch.zeros(2, dtype=torch.int64))]))


def check_head(
    model: nn.Module, method: Method, decided: Plan | Sensitivity | None, n_classes: int
) -> None:
    """Refuse a head without the layer that gives the scores, whose classes a task file names.

    Args:
        model: plain.
        method: told of its head, if it has to be.
        decided: what was given and has a head of its own.
        n_classes: how many scores there are.

    Raises:
        ValueError: no tensor of the head has so many rows.
    """
    if method.entry.holds is None or (decided is None and method.head is None):
        return  # it ends in no task file, or its head is found by the scores
    head = head_names(model, method.head) if decided is None else decided.head
    tensors = [p for name, p in model.named_parameters() if name in head and p.ndim]
    rows = list(dict.fromkeys(len(tensor) for tensor in tensors))
    if rows and n_classes not in rows:
        raise ValueError(
            f"head: expected the layer that gives the scores of the {n_classes} classes among it, "
            f"got {', '.join(layers_of(head))}, of {' or '.join(map(str, rows))} outputs"
        )
