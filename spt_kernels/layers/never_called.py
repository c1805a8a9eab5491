"""Tells a tuned layer that the model never calls from one that a batch has passed by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .name_in_model import name_in_model, told_as

_NUMBER = re.compile(r"\d+")


def check_called(without: Iterable[nn.Module], tuned: Iterable[Any]) -> None:
    """Refuse to train on when a tuned layer cannot be reached by any gradient.

    A layer whose weight the model reads itself is called in no block. One that is dropped at random
    (LayerDrop), or that no token was sent to (a mixture of experts), has others of its kind that
    were called: a later batch may reach it.

    Args:
        without: tuned layers that were not called so far, and have no gradient after a backward.
        tuned: all tuned layers that the optimizer trains.

    Raises:
        RuntimeError: no layer of the same name, but for the numbers in it, was called either.
    """
    called = {_kind_of(layer) for layer in tuned if layer.spt_was_called}
    for layer in without:
        kind = _kind_of(layer)
        if not kind or kind not in called:
            raise RuntimeError(_never_called(layer))


def _kind_of(layer: nn.Module) -> str:
    """Its name in the model with a mark for each number; empty for a layer that has none."""
    return _NUMBER.sub("#", name_in_model(layer))


def _never_called(layer: nn.Module) -> str:
    return (
        f"{told_as(layer)} is tuned, but the model never calls it (it reads the weight of the "
        "layer itself, as BEiT and Swin V2 do with `qkv`), so that it would never train: "
        "measure_sensitivity notices that and says so in Sensitivity.info, from which allocate and "
        "apply know what to do; in a plan made otherwise, set the kind of its weight to "
        "'functional' or leave it out"
    )
