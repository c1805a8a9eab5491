"""The base model under a bank: what it was, to the last bit, and whether others have changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..model.buffers import copied
from ..model.check import check_trainable_itself
from ..model.deep_copy import deep_copy
from ..model.kept import forget_kept, has_own_mode
from ..model.quantized import quantized_names
from ..model.tied import has_memory, identity_of
from ..ops.write_delta import gather_original
from ..task.base_model import BaseModel, holds_peft
from ..task.file.fingerprint import Fingerprint
from ..task.fit import base_values
from .banked_task import BankedTask

_LOST = "which no longer knows its base: make the model what it is to be first, then a new bank"


class Base:
    """A plain model whose weights a bank writes tasks into.

    Attributes:
        model: the module itself.
        now: what is where in it, by the names of the base.
        modules: module name -> module, as they are in the base.
        structure: the plain model without values, on the meta device: what `model` is when no task
            is on.
        tied: parameter name -> its other names, in modules of their own.
        fingerprints: name -> fingerprint of a parameter, or floating buffer, in the base.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_trainable_itself(model, "give a bank")
        if holds_peft(model):
            raise ValueError(
                "model is a PeftModel, a bank takes the plain base model: model.get_base_model()"
            )
        self.now = BaseModel.of(model)
        if getattr(model, "spt_tuning", None) is not None or self.now.tuned:
            raise ValueError(
                "model is tuned, a bank takes the plain base model: spt.unload(model) first, and "
                "bank.add(name, tuned_model) for the task"
            )
        for name, quantized in quantized_names(model).items():
            raise ValueError(
                f"{name} is quantized to {quantized}, and a bank writes tasks into weights: give "
                "it the float model, spt.dequantize(model), or switch tasks with load_delta"
            )
        self.model = model
        self.modules = dict(model.named_modules())
        self.structure = _without_values(model)
        self.tied = BaseModel.of(self.structure).tied
        named = {*self.now.parameters, *self.now.buffers}
        values = base_values(model, self.now, named)
        self.fingerprints: Mapping[str, Fingerprint] = Fingerprint.of_all(
            {name: row for name, row in values.items() if row[0].element_size() <= 8}
        )
        self._whole: dict[str, Tensor] = {}
        self._buffers = copied(self.now.buffers)
        # full name of each module and parameter, what it is in, and its name there
        self._places = [
            (f"{prefix}.{local}" if prefix else local, inside, local)
            for prefix, module in self.modules.items()
            for inside in (module._parameters, module._modules)
            for local in inside
        ]
        self._keep = [module for module in self.modules.values() if has_own_mode(module)]
        self._watched = [*self.now.parameters, *self.now.owners, *self.modules]
        self._state: list[object] = []
        self._there: list[nn.Module | nn.Parameter | None] = []
        self.record()

    def record(self) -> None:
        """Take the weights for ours as they are now: nobody else has changed them."""
        self._state = self._state_now()
        self._there = self._found_there()

    def check_unchanged(self) -> None:
        """Raise `ValueError` where somebody else has written, moved, cast, tuned or replaced."""
        there = zip(self._places, self._there, self._found_there(), strict=True)
        for (name, _, _), is_ours, is_there in there:
            if is_ours is not is_there:
                raise ValueError(f"{name} was replaced behind the bank, {_LOST}")
        states = zip(self._watched, self._state, self._state_now(), strict=True)
        for name, before, after in states:
            if before != after:
                raise ValueError(
                    f"{name or 'the model'} was changed, moved or cast behind the bank, {_LOST}"
                )

    def forget_kept(self) -> None:
        """Let forwards look anew at parameters that were just written."""
        forget_kept(self._keep)

    def remember(self, name: str, current: BankedTask | None) -> None:
        """Keep a copy of a parameter that a task replaces whole, once for all tasks.

        Args:
            name: of the parameter.
            current: the task that the model has on.
        """
        if name not in self._whole:
            value = self.now.parameters[name].detach().clone()
            part = None if current is None else current.sparse.get(name)
            if part is not None:
                value.view(-1)[part.positions.index.long()] = part.positions.base
            self._whole[name] = value

    def gather(self, name: str, index: Tensor, current: BankedTask | None) -> Tensor:
        """The base values of a parameter at some positions, `[nnz]`, whatever task is on."""
        if name in self._whole:
            return self._whole[name].view(-1).index_select(0, index)
        found = gather_original(self.now.parameters[name], index)
        part = None if current is None else current.sparse.get(name)
        if part is not None:
            own = part.positions.index
            place = torch.searchsorted(own, index).clamp_(max=len(own) - 1)
            found = torch.where(own[place] == index, part.positions.base[place], found)
        return found

    def whole(self, name: str) -> Tensor:
        """The base values of a parameter that `remember` was called for."""
        return self._whole[name]

    def buffers(self, names: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The base values of buffers."""
        return {name: self._buffers[name] for name in names}

    @property
    def nbytes(self) -> int:
        """Of the copies that the bank keeps of the base, buffers included."""
        kept = [*self._whole.values(), *(b for b in self._buffers.values() if b is not None)]
        return sum(tensor.nbytes for tensor in kept)

    def _state_now(self) -> list[object]:
        """What tells that a parameter, a buffer or the class of a module has become another."""
        buffers = [module._buffers.get(local) for module, local in self.now.owners.values()]
        return [
            *((p._version, p.data_ptr()) for p in self.now.parameters.values()),
            *(None if b is None else (_version(b), b.data_ptr()) for b in buffers),
            *map(type, self.modules.values()),
        ]

    def _found_there(self) -> list[nn.Module | nn.Parameter | None]:
        return [inside.get(local) for _, inside, local in self._places]


def _version(buffer: Tensor) -> int:
    """How often it was written in place; a forward in inference mode may have made it."""
    return -1 if buffer.is_inference() else buffer._version


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, which takes no memory."""
    tensors: dict[int, Any] = {}
    same: dict[object, nn.Parameter] = {}  # of two that lie in one memory
    memory: dict[int, torch.UntypedStorage] = {}
    for parameter in model.parameters():
        empty = nn.Parameter(_like(parameter, memory), parameter.requires_grad)
        key = identity_of(parameter), parameter.shape
        tensors[id(parameter)] = same.setdefault(key, empty)
    for buffer in model.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():  # what a forward has left there may have a graph
        for value in tree_iter(vars(module)):
            if isinstance(value, Tensor):
                tensors.setdefault(id(value), torch.empty_like(value.detach(), device="meta"))
    return deep_copy(model, tensors, "a bank")


def _like(parameter: Tensor, memory: dict[int, torch.UntypedStorage]) -> Tensor:
    """The same on the meta device, in memory that it shares with whom it shares its own."""
    empty = torch.empty_like(parameter, device="meta")
    if not has_memory(parameter):
        return empty
    own = parameter.untyped_storage()
    if own._cdata not in memory:
        memory[own._cdata] = torch.UntypedStorage(own.nbytes(), device="meta")
    shape, stride = parameter.shape, parameter.stride()
    return empty.set_(memory[own._cdata], parameter.storage_offset(), shape, stride)
