"""Where the tuned layers of a model are, by the names of the base model."""

from __future__ import annotations

from torch import nn

from .deltas.delta_holder import DeltaHolder
from .deltas.doubt import settle_for_good
from .deltas.sparse_delta import SparseDelta


def tuned_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every module that is tuned."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DeltaHolder)}


def settle_doubts(model: nn.Module) -> None:
    """Have all weights hold their deltas, and let no forward look whether they do.

    For those who write each change themselves from here on, and may not wait for a card.
    """
    for module in tuned_modules(model).values():
        settle_for_good(module)


def sparse_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """Name of a parameter in the base model -> its sparse delta."""
    return {
        f"{name}.{local}" if name else local: delta
        for name, module in tuned_modules(model).items()
        for local, delta in module.sparse_deltas().items()  # type: ignore[operator]
    }
