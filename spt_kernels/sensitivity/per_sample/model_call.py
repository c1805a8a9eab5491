"""How a model is called with the input of a batch: as it is, or a mapping by its keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def call(model: nn.Module, input: Any) -> Any:
    """`model(input)`, or `model(**input)` of a mapping whose keys its forward takes by name."""
    if isinstance(input, Mapping) and _takes_by_name(model, input):
        return model(**input)
    return model(input)


def _takes_by_name(model: nn.Module, input: Mapping[str, Any]) -> bool:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**input)
    except TypeError:  # an unknown key, a missing argument, a key that is no string
        return False
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    takes_anything = set(kinds.values()) == {inspect.Parameter.VAR_KEYWORD}
    # keys that a `**kwargs` alone takes say nothing of a forward whose first argument is a mapping
    return takes_anything or any(
        kinds.get(key) not in (None, inspect.Parameter.VAR_KEYWORD) for key in input
    )
