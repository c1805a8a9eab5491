"""Where the tuned layers of a model are, by the names of the base model."""

from __future__ import annotations

from torch import nn

from .adapter import AdapterLinear
from .delta_holder import DeltaHolder
from .lora import LoraLinear
from .sparse_delta import SparseDelta


def tuned_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every module that is tuned; of a LoRA on a sparse layer just the outer one."""
    found: dict[str, nn.Module] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if name in inside:
            continue
        if isinstance(module, (LoraLinear, AdapterLinear)):
            found[name] = module
            inside.add(f"{name}.base" if name else "base")
        elif isinstance(module, DeltaHolder):
            found[name] = module
    return found


def sparse_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """Name of a parameter in the base model -> its sparse delta."""
    return {
        f"{name}.{local}" if name else local: delta
        for name, module in tuned_modules(model).items()
        for local, delta in module.sparse_deltas().items()  # type: ignore[operator]
    }
