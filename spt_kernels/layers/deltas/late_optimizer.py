"""Notices an optimizer of before the model was tuned as it is, which holds nothing that trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_FROZEN_IN = "_spt_frozen_in"
_DROPPED_BY = "_spt_dropped_by"
_CAST = "_spt_cast"


class _Tag:
    """A weak reference to a module that a parameter is or was of."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # nothing, to whoever unpickles it; even `weights_only=True` reads that


def mark_frozen(parameters: Iterable[Tensor], model: nn.Module) -> None:
    """Let `check_made_after` know the parameters that `apply` froze in `model`."""
    for parameter in parameters:
        setattr(parameter, _FROZEN_IN, _Tag(model))


def unmark_frozen(parameters: Iterable[Tensor]) -> None:
    """Let `check_made_after` forget what an earlier plan froze."""
    for parameter in parameters:
        vars(parameter).pop(_FROZEN_IN, None)


def mark_dropped(parameters: Iterable[Tensor], layer: nn.Module) -> None:
    """Let `check_made_after` know what was trained in a layer that is plain now."""
    for parameter in parameters:
        setattr(parameter, _DROPPED_BY, _Tag(layer))


def mark_cast(parameter: Tensor, name: str) -> None:
    """Let `check_not_cast` know a head's parameter whose values in fp32 are trained from now on."""
    setattr(parameter, _CAST, name)


def check_not_cast(parameter: Tensor) -> None:
    """Refuse an optimizer of a head of before it was trained in fp32, which it is no longer by it.

    Raises:
        RuntimeError: it is such a one.
    """
    name = getattr(parameter, _CAST, None)
    if name is not None:
        raise RuntimeError(
            f"the optimizer holds {name}, which was cast to 16 bits after spt.apply, and whose "
            f"values are trained in fp32 since a later param_groups or load_state_dict: make it "
            f"anew after these, {_HOW}"
        )


def check_made_after(parameters: Iterable[Tensor]) -> None:
    """Refuse an optimizer of these parameters, none of which is a part of a tuned layer.

    Raises:
        RuntimeError: some are frozen parameters of a model that is tuned now, or what was trained
            in it before it was tuned anew.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            model, was_dropped = _tagged(parameter, _FROZEN_IN), False
        else:
            model, was_dropped = _model_of(_tagged(parameter, _DROPPED_BY)), True
        if hasattr(model, "spt_tuning"):
            raise RuntimeError(_dropped(model) if was_dropped else _early(model))


def _model_of(layer: nn.Module | None) -> nn.Module | None:
    """The model that the last plan froze a layer's parameters in."""
    own = () if layer is None else layer.parameters(recurse=False)
    return next(filter(None, (_tagged(parameter, _FROZEN_IN) for parameter in own)), None)


def _tagged(parameter: Tensor, name: str) -> nn.Module | None:
    tag = getattr(parameter, name, None)
    return tag.module() if isinstance(tag, _Tag) else None


def _early(model: nn.Module | None) -> str:
    return (
        "the optimizer was made before the plan was applied: it holds parameters of "
        f"{type(model).__name__} that are frozen now, and none of those that are trained. "
        f"Make it after apply, {_HOW}"
    )


def _dropped(model: nn.Module | None) -> str:
    return (
        "the optimizer was made for another task: what it trained in "
        f"{type(model).__name__} was dropped by load_delta, unload or merge, and it holds nothing "
        f"that is trained in its layers now. Make it anew after load_delta or apply, {_HOW}"
    )


_HOW = "as spt.SparseAdamW(spt.param_groups(model)) or torch.optim.AdamW(spt.param_groups(model))"
