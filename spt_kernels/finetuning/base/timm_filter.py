"""timm's own translation of a state dict for one architecture: older names, other image sizes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import needed

with needed("building models by name"):
    from timm.models import _builder

# what code that reads one form of names raises at another form
NOT_ITS_FORM = (LookupError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
Translation = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]


def translation_of(create: Callable[[dict[str, Any]], object]) -> Translation | None:
    """What timm would pass weights through on their way into a model; `None` if nothing.

    timm hands it to its loader at the moment when it builds the model with weights, and keeps it
    nowhere. So a loader that only listens stands in while `create` builds one.

    Args:
        create: build the model with these arguments of `timm.create_model` beside its own; what it
            returns is not used.
    """
    heard: list[Translation | None] = []
    asked = {"spt_kernels": torch.empty(0)}  # by which our own call is known from any other
    with torch.random.fork_rng(devices=[]), _listening(asked, heard):
        create({"pretrained": True, "pretrained_cfg_overlay": {"state_dict": asked}})
    return next((_of_two(found) for found in heard if found is not None), None)


@contextlib.contextmanager
def _listening(asked: Mapping[str, Tensor], heard: list[Translation | None]) -> Iterator[None]:
    own = _builder.load_pretrained

    def listen(model: nn.Module, pretrained_cfg: Any = None, *args: Any, **kwargs: Any) -> None:
        if ((pretrained_cfg or {}).get("state_dict") or {}).keys() != asked.keys():
            return own(model, pretrained_cfg, *args, **kwargs)  # of another thread
        heard.append(kwargs.get("filter_fn"))
        return None

    _builder.load_pretrained = listen
    try:
        yield
    finally:
        _builder.load_pretrained = own


def _of_two(translate: Callable[..., Any]) -> Translation:
    # some take the state dict alone
    if len(inspect.signature(translate).parameters) > 1:
        return translate
    return lambda state, _model: translate(state)
