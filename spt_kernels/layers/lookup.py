"""Where the tuned layers of a model are, by the names of the base model."""

from __future__ import annotations

from torch import nn

from .deltas.delta_holder import DeltaHolder
from .deltas.sparse_delta import SparseDelta


def tuned_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every module that is tuned."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DeltaHolder)}


def sparse_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """Name of a parameter in the base model -> its sparse delta."""
    return {
        f"{name}.{local}" if name else local: delta
        for name, module in tuned_modules(model).items()
        for local, delta in module.sparse_deltas().items()  # type: ignore[operator]
    }
