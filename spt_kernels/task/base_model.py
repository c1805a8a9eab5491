"""The base model inside a tuned one: its parameters, by their own names, with their own bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..layers import AdapterLayer, LoraLayer, SparseDelta
from ..layers.deltas.delta_holder import DeltaHolder
from ..model.quantized import is_quantized

# A tensor, and the positions at which it counts as if it held other values: both None, or [nnz]
BaseTensor = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class BaseModel:
    """What is where in a model, tuned or plain, by the names of the base model, in its order.

    What has several names goes by the first of them, as in `named_parameters()`. Made in one walk
    over the modules; it is out of date as soon as one of them is replaced.

    Attributes:
        parameters: name -> parameter, as it is: a tuned weight holds base + delta.
        buffers: name -> buffer that the state dict of the base model has, such as running
            statistics, or would have if it were not None as yet.
        owners: name of a buffer -> the module that has it, and its name there.
        tuned: module name -> the tuned module there.
        deltas: parameter name -> its sparse delta.
        structured: name of a weight -> the LoRA or Adapter on it.
        tied: parameter name -> the other names of that parameter, in modules of their own.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor | None]
    owners: dict[str, tuple[nn.Module, str]]
    tuned: dict[str, nn.Module]
    deltas: dict[str, SparseDelta]
    structured: dict[str, LoraLayer | AdapterLayer]
    tied: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """Walk over a model."""
        found = cls({}, {}, {}, {}, {}, {}, {})
        _walk(model, "", found, {})
        return found

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP has dealt parameters out to several processes."""
        return any(map(is_sharded, self.parameters.values()))

    @property
    def trained_tensors(self) -> dict[str, Tensor]:
        """Parameters; of what is trained whole in fp32, those values."""
        whole = {name: delta.delta for name, delta in self.deltas.items() if delta.whole}
        return {**self.parameters, **whole}

    def is_planned(self, name: str) -> bool:
        """Whether there is on a parameter what a plan puts there: a LoRA, an Adapter, a delta."""
        if name in self.structured:
            return True
        delta = self.deltas[name]
        return not delta.whole and delta.index.numel() > 0

    def base_tensors(self, names: Collection[str]) -> dict[str, BaseTensor]:
        """Some parameters, with the positions at which the base has other values, and those."""
        found: dict[str, BaseTensor] = {}
        for name, parameter in self.parameters.items():
            if name in names:
                delta = self.deltas.get(name)
                changed: tuple[Tensor | None, Tensor | None] = (None, None)
                if delta is not None and not (delta.whole or delta.beside):
                    changed = (delta.index, delta.original)
                # detached, a weight of bitsandbytes would no longer know how it is quantized
                own = parameter if is_quantized(parameter) else parameter.detach()
                found[name] = (own, *changed)
        return found


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself under `torch.compile`, data-parallel wrappers and PEFT."""
    *_, itself = _inwards(model)
    return itself


def is_data_parallel(model: nn.Module) -> bool:
    """Whether a data-parallel wrapper relies on the parameters that the model has now."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return _is_wrapper(model)


def holds_peft(model: nn.Module) -> bool:
    """Whether there is a `PeftModel` among what is wrapped around the model itself."""
    return any(_is_peft(each) for each in _inwards(model))


def _inwards(model: nn.Module) -> Iterator[nn.Module]:
    """What is given, what it is wrapped around, and so on to the model itself."""
    while True:
        yield model
        if _is_wrapper(model):
            model = model.module  # type: ignore[assignment]
        elif _is_peft(model):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return


def _walk(module: nn.Module, prefix: str, found: BaseModel, seen: dict[int, str]) -> None:
    """Add what is in a module, but for what is seen already: ids of modules and tensors."""
    seen[id(module)] = prefix
    added: set[str] = set()
    if isinstance(module, DeltaHolder):
        found.tuned[prefix.removesuffix(".")] = module
        for local, delta in module.sparse_deltas().items():
            found.deltas[prefix + local] = delta
        if isinstance(module, (LoraLayer, AdapterLayer)):
            found.structured[f"{prefix}weight"] = module
        added = set(module.added_names())
    for local, parameter in module._parameters.items():
        if parameter is None or local in added:
            continue
        name = prefix + local
        first = seen.setdefault(id(parameter), name)
        if first == name:
            found.parameters[name] = parameter
        else:
            found.tied.setdefault(first, []).append(name)
    transient = module._non_persistent_buffers_set
    for local, buffer in module._buffers.items():
        if local not in transient:
            found.buffers[prefix + local] = buffer
            found.owners[prefix + local] = module, local
    for local, child in module._modules.items():
        if child is not None and id(child) not in seen:
            _walk(child, f"{prefix}{local}.", found, seen)


def _is_peft(model: nn.Module) -> bool:
    return callable(getattr(type(model), "get_base_model", None)) and hasattr(model, "peft_config")


def _is_wrapper(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
