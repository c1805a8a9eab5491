"""Weights from a file into a model, whole or refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ...model import head_names
from .timm_filter import NOT_ITS_FORM, Translation
from .weight_file import first_line, is_array_file, read_state_dicts
from .weight_match import match_weights

_BLOCK = re.compile(r"(encoderblock_\d+|block\d+/unit\d+)/")  # in the names of JAX's files


@dataclass(frozen=True)
class LoadedWeights:
    """What became of a file.

    Attributes:
        head_is_new: whether the head was left as it was, the file having none for these classes.
        notes: what was found where, changed, and left out, for people to read.
    """

    head_is_new: bool
    notes: tuple[str, ...] = ()


def load_weights(
    model: nn.Module, path: str, translation: Callable[[], Translation | None]
) -> LoadedWeights:
    """Load a file into `model`; see `read_state_dicts` and `match_weights` for what is understood.

    Args:
        model: in which a head for other classes than the file's stays as it is.
        path: the file.
        translation: of timm for this architecture, see `translation_of`.

    Raises:
        ValueError: not a file of weights, or of another model; the model may then have lost its
            values.
    """
    try:
        groups = None if is_array_file(path) else read_state_dicts(path)
    except ValueError as error:
        raise ValueError(f"weights: {error}") from error
    if groups is None:
        return _load_arrays(model, path)
    try:
        match = match_weights(model, groups, functools.cache(translation))
    except ValueError as error:
        raise ValueError(f"weights: {path} is of another model: {error}") from error
    model.load_state_dict(match.state, strict=False)
    return LoadedWeights(not match.head_fits, match.notes)


def _load_arrays(model: nn.Module, path: str) -> LoadedWeights:
    """Load a file of arrays as JAX's ViT and ResNet were published, through timm's own reader."""
    read = getattr(model, "load_pretrained", None)
    if not callable(read):
        raise ValueError(
            f"weights: timm reads {path} for ViT and ResNetV2 alone, not {type(model).__name__}"
        )
    _check_blocks(model, path)
    head = {name: model.get_parameter(name).detach().clone() for name in head_names(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what is still so afterwards was not in the file
        try:
            read(path)
        except NOT_ITS_FORM as error:
            raise ValueError(f"weights: {path} is of another model: {first_line(error)}") from error
        unread = [name for name, p in model.named_parameters() if p.isnan().any()]
        missing = [name for name in unread if name not in head]
        if missing:
            raise ValueError(
                f"weights: {path} is of another model: it lacks {missing[0]}"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            )
        for name in head if unread else ():
            model.get_parameter(name).copy_(head[name])
    return LoadedWeights(bool(unread) or not head, ("read as JAX's arrays",))


def _check_blocks(model: nn.Module, path: str) -> None:
    with np.load(path, allow_pickle=False) as arrays:
        n_here = len({found[1] for name in arrays.files if (found := _BLOCK.search(name))})
    own = sum(bool(re.search(r"(^|\.)blocks\.\d+$", name)) for name, _ in model.named_modules())
    if n_here not in (0, own):  # big_vision stacks the blocks in one array
        raise ValueError(
            f"weights: {path} is of another model: it has {n_here} blocks, the model has {own}"
        )
