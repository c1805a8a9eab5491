"""`SptAdapters`: which adapter's task is on the model, and those that are set aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers import all_or_nothing
from ..offloading import is_streamed
from ..task.base_model import BaseModel
from ..task.intact import dense_names
from ..task.set_aside import (
    MergedTask,
    TaskAside,
    merge_aside,
    put_task_back,
    take_aside,
    unmerge,
)


class SptAdapters(nn.Module, BaseTunerLayer):
    """The adapters of one model, of which at most one is on it.

    To PEFT it is the one tuned layer that there is: deltas lie within the weights of the model, so
    that adapters take turns as a whole. Parameters of one that is set aside stay the same objects.

    Attributes:
        on_model: name of the adapter whose task the model holds, merged or not; None while the
            model is the base model.
        aside: name -> task of every other adapter.
    """

    def __init__(self, active: str) -> None:
        super().__init__()
        self.on_model: str | None = None
        self.aside: dict[str, TaskAside] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = active
        self.merged_adapters: list[str] = []
        self._merged: MergedTask | None = None

    def put_on(self, model: nn.Module, name: str | None, undo: ExitStack | None = None) -> None:
        """Let the model hold the task of an adapter, or none.

        On any error, as where memory runs out, the model holds what it held and none is lost.

        Args:
            model: the one that all adapters are of.
            name: of the adapter.
            undo: of a larger exchange: takes the way back, which needs no memory.

        Raises:
            ValueError: the model is no longer as it was tuned, or is offloaded.
        """
        if name == self.on_model:
            return
        _check_here(model)
        aside = dict(self.aside)
        with all_or_nothing(undo) as steps:
            names = ("on_model", "aside", "_merged", "merged_adapters")
            steps.callback(self.__dict__.update, {each: getattr(self, each) for each in names})
            if self._merged is not None:
                unmerge(model, self._merged, steps)
            if self.on_model is not None:
                aside[self.on_model] = take_aside(model, steps)
            if name is not None:
                put_task_back(model, aside.pop(name), steps)
        self._merged, self.merged_adapters = None, []
        self.on_model, self.aside = name, aside

    @contextmanager
    def showing(self, model: nn.Module, name: str) -> Iterator[None]:
        """Let the model hold the task of an adapter to be read, and no more, in a `with` block."""
        with ExitStack() as back:
            self._turn(model, name, back)
            yield

    @contextmanager
    def holding(self, model: nn.Module, name: str | None) -> Iterator[None]:
        """Let the model hold the task of an adapter, or none, to be changed in a `with` block.

        On any error, in the block or after it, the model holds what it held.
        """
        before, was_merged = self.on_model, self.merged
        with all_or_nothing() as undo:
            self._turn(model, name, undo)
            yield
            # unless it was dropped or merged for good meanwhile
            known = before in self.aside or before == self.on_model
            self.put_on(model, before if known else None, undo)
            if was_merged and known:
                self.merge_on(model)

    def _turn(self, model: nn.Module, name: str | None, undo: ExitStack) -> None:
        if self.merged:
            self.put_on(model, None, undo)
        self.put_on(model, name, undo)

    def merge_on(self, model: nn.Module) -> None:
        """Fold the task that the model holds into its weights until `unmerge`."""
        assert self.on_model is not None
        _check_here(model)
        self._merged = merge_aside(model)
        self.merged_adapters = [self.on_model]

    def unmerge(self, model: nn.Module) -> None:  # type: ignore[override]  # of a model, not a layer
        """Undo `merge_on`, to the bit, where it was done."""
        if self._merged is not None:
            _check_here(model)
            unmerge(model, self._merged)
            self._merged, self.merged_adapters = None, []

    def freeze(self, name: str) -> None:
        """Let an adapter that is set aside train nothing once it is put on the model."""
        aside = self.aside[name]
        for module in aside.modules.values():
            for parameter in module.parameters.values():
                parameter.requires_grad_(False)
        flags = {**aside.requires_grad, **dict.fromkeys(aside.dense, False)}
        self.aside[name] = replace(aside, requires_grad=flags)

    def drop(self, model: nn.Module, name: str) -> None:
        """Forget an adapter and its task."""
        if name == self.on_model:
            self.put_on(model, None)
        self.aside.pop(name, None)

    def _get_available_adapters(self) -> set[str]:
        return {*self.aside, *([] if self.on_model is None else [self.on_model])}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Deltas are sparse, and of no low rank."""
        return False


def _check_here(model: nn.Module) -> None:
    """Refuse to exchange weights that are on the host just now."""
    if is_streamed(model):
        raise ValueError(
            "cannot switch, merge or drop adapters: the model is offloaded: bring its weights back "
            "with spt.offload(model, 'nothing')"
        )


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Of a tuned model all that its task trains, whether it is frozen just now or not.

    Raises:
        ValueError: the model is tuned no longer.
    """
    if not hasattr(model, "spt_tuning"):
        raise ValueError(
            "the model is not tuned, or no longer: its task was merged or dropped behind the "
            "PeftModel, which is of no use any more"
        )
    now = BaseModel.of(model)
    tuned: list[Any] = list(now.tuned.values())
    added = [module._parameters.get(name) for module in tuned for name in module.added_names()]
    whole = [now.parameters[name] for name in dense_names(model, now) - now.deltas.keys()]
    return [parameter for parameter in (*added, *whole) if parameter is not None]
