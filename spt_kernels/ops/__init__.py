"""The public functions of every op, each loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "accumulate_squared_grad": "squared_grad",
    "accumulate_squared_vector_grad": "squared_grad",
    "top_tau": "top_tau",
    "sparse_weight_grad": "sparse_weight_grad",
    "rebuild_gelu": "rebuild_input",
    "rebuild_layer_norm": "rebuild_input",
    "AdamWEntry": "sparse_adamw",
    "sparse_adamw": "sparse_adamw",
    "gather_original": "write_delta",
    "write_delta": "write_delta",
}

__all__ = [
    "AdamWEntry",
    "accumulate_squared_grad",
    "accumulate_squared_vector_grad",
    "gather_original",
    "rebuild_gelu",
    "rebuild_layer_norm",
    "sparse_adamw",
    "sparse_weight_grad",
    "top_tau",
    "write_delta",
]

if TYPE_CHECKING:
    from .rebuild_input import rebuild_gelu, rebuild_layer_norm
    from .sparse_adamw import AdamWEntry, sparse_adamw
    from .sparse_weight_grad import sparse_weight_grad
    from .squared_grad import accumulate_squared_grad, accumulate_squared_vector_grad
    from .top_tau import top_tau
    from .write_delta import gather_original, write_delta


def __getattr__(name: str) -> Any:
    # Some ops share their name with the file that defines them, and importing a submodule binds the
    # module over the function: hence the explicit assignment after the import.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
