"""Notices an optimizer made before `apply`, which holds what is frozen and nothing that trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_TAG = "_spt_frozen_in"


class _ModelTag:
    """A weak reference to the model that a frozen parameter is of."""

    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # nothing, to whoever unpickles it; even `weights_only=True` reads that


def mark_frozen(parameters: Iterable[Tensor], model: nn.Module) -> None:
    """Let `check_made_after` know the parameters that `apply` froze in `model`."""
    for parameter in parameters:
        setattr(parameter, _TAG, _ModelTag(model))


def check_made_after(parameters: Iterable[Tensor]) -> None:
    """Refuse an optimizer of these parameters, none of which is a part of a tuned layer.

    Raises:
        RuntimeError: some are frozen parameters of a model that is tuned now.
    """
    for parameter in parameters:
        tag = None if parameter.requires_grad else getattr(parameter, _TAG, None)
        model = tag.model() if isinstance(tag, _ModelTag) else None
        if hasattr(model, "spt_tuning"):
            raise RuntimeError(
                "the optimizer was made before the plan was applied: it holds parameters of "
                f"{type(model).__name__} that are frozen now, and none of those that are trained. "
                "Make it after apply, as spt.SparseAdamW(spt.param_groups(model)) or "
                "torch.optim.AdamW(spt.param_groups(model))"
            )
