"""A batch whose samples are for several tasks: what each touched module does for which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.norm import is_layer_norm
from ..tuning.places import is_linear
from .banked_task import BankedTask, OwnParameters
from .base import Base
from .layout import Layout
from .mixed_layers import MixedCall, MixedLinear, MixedNorm, MixedPieces
from .structured import StructuredGroup, add_structured, groups_of

_NOTHING = OwnParameters({}, {}, {})


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """Samples in the order of their tasks.

    Attributes:
        base: the model, without any task on.
        tasks: of the batch, each once; None for the base itself.
        counts: how many samples each has, one after another.
    """

    base: Base
    tasks: Sequence[BankedTask | None]
    counts: Sequence[int]

    @torch.no_grad()
    def run(self, images: Tensor, layout: Layout) -> list[Tensor]:
        """The model's outputs for each task's samples, `[samples, ...]`.

        Args:
            images: `[samples, ...]` in the order of the tasks.
            layout: of the model; `mixing_problem` found nothing wrong.
        """
        handles = []
        try:
            for name in self._touched():
                hook = self._hook(name, len(images))
                handles.append(self.base.modules[name].register_forward_hook(hook))
            output = self.base.model(images)
        finally:
            for handle in handles:
                handle.remove()
            self.base.record()  # some layers were lent a task's values
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must return a tensor, got {type(output).__name__}")
        found = list(output.split(list(self.counts)))
        for name in layout.last & set(self._touched()):
            for n, task in enumerate(self.tasks):
                n_rows = self._rows_of_head(task, name)
                if n_rows is not None:
                    found[n] = found[n][..., :n_rows]
        return found

    def _touched(self) -> list[str]:
        """Names of the modules that some task of the batch changes."""
        tasks = (task for task in self.tasks if task is not None)
        return list(dict.fromkeys(name for task in tasks for name in task.by_module))

    def _hook(self, name: str, n_samples: int) -> _MixedHook:
        """What a module does with parameters that are other ones for each task."""
        module = self.base.modules[name]
        own = [_NOTHING if t is None else t.by_module.get(name, _NOTHING) for t in self.tasks]
        call = mixed_kind(module)(
            module, [parts.sparse for parts in own], [parts.whole for parts in own], self.counts
        )
        groups = groups_of([parts.structured.get("weight") for parts in own], self.counts)
        return _MixedHook(call, groups, n_samples)

    def _rows_of_head(self, task: BankedTask | None, name: str) -> int | None:
        """Outputs that a module of the head has for a task; None where it is no Linear's."""
        weight = None if task is None else task.by_module.get(name, _NOTHING).whole.get("weight")
        if weight is None:
            weight = self.base.modules[name]._parameters.get("weight")
        return len(weight) if weight is not None and weight.dim() == 2 else None


def mixing_problem(base: Base, tasks: Sequence[BankedTask | None], layout: Layout) -> str | None:
    """Why a batch of these tasks cannot run as one; None if it can.

    Args:
        base: the model.
        tasks: of the batch.
        layout: of the model.
    """
    for name, module in base.modules.items():
        if getattr(module, "_compiled_call_impl", None) is not None:
            return f"{name or 'the model'} is compiled in place"
    for task in tasks:
        if task is None:
            continue
        if task.buffers:
            return f"{min(task.buffers)} is a buffer, which has one value for the whole batch"
        for module_name, own in task.by_module.items():
            local = next(iter({**own.sparse, **own.whole, **own.structured}))
            name = f"{module_name}.{local}" if module_name else local
            for each in {**own.sparse, **own.whole}:
                full = f"{module_name}.{each}" if module_name else each
                if full in base.tied:
                    return f"{full} is tied to {base.tied[full][0]}, of another layer"
            module = base.modules.get(module_name)
            if module is None or module_name in task.read:
                return f"{name}: the model reads it outside of its layer"
            if "forward" in vars(module) or module._forward_hooks:
                return f"{name} belongs to a layer with a forward or hooks of its own"
            if next(module.children(), None) is not None:
                return f"{name} belongs to a module of several layers"
            if module_name in layout.problems:
                return f"{name}: {layout.problems[module_name]}"
    for module_name in {name for task in tasks if task is not None for name in task.replaced}:
        if module_name not in layout.last:
            return f"{module_name} has as many outputs as its task has classes, and more follows it"
        if mixed_kind(base.modules[module_name]) is not MixedLinear:
            return f"{module_name} is no plain Linear, and not of the size that a task needs"
        for task in tasks:
            has = {} if task is None else task.by_module.get(module_name, _NOTHING).whole
            if "weight" not in has:
                return f"{module_name}: one of the tasks has no head of its own there"
            if "bias" not in has and getattr(base.modules[module_name], "bias", None) is not None:
                return f"{module_name}: one of the tasks has a head without a bias there"
    return None


def mixed_kind(module: nn.Module) -> type[MixedCall]:
    """How a module of this kind is called for several tasks."""
    if is_linear(module) or type(module) is nn.Identity:
        return MixedLinear
    if is_layer_norm(module):
        return MixedNorm
    return MixedPieces


@dataclass(frozen=True, eq=False)
class _MixedHook:
    """Makes of the base layer's output that of each sample's own task."""

    call: MixedCall
    groups: tuple[StructuredGroup, ...]
    n_samples: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = self.call(args[0], output)
        if self.groups:
            add_structured(module, args[0], output, self.groups, self.n_samples)
        return output
