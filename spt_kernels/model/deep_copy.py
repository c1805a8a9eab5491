"""A deep copy of a model, or which attribute of it has none."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

_Model = TypeVar("_Model", bound=nn.Module)


def deep_copy(model: _Model, memo: dict[int, Any], maker: str) -> _Model:
    """`copy.deepcopy` of a model.

    Args:
        model: any.
        memo: ids of what is in it -> what takes its place in the copy.
        maker: what makes a copy, for messages: `"a bank"`.

    Raises:
        ValueError: an attribute cannot be copied, as a lock or an open file; names it.
    """
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError) as error:
        modules: dict[int, Any] = {id(module): module for module in model.modules()}
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                try:
                    copy.deepcopy(value, {**modules, **memo})
                except (TypeError, RuntimeError) as own:
                    path = f"{name}.{attribute}" if name else attribute
                    raise ValueError(
                        f"model: {path} cannot be copied ({own}), and {maker} makes a copy of the "
                        "model: set it to None meanwhile, or give its class a __deepcopy__"
                    ) from error
        raise
