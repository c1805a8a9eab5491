"""`SptModel`: SPT as a tuner of PEFT, a thin view of `apply`, `merge` and the task on a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..layers import LoraLayer, all_or_nothing
from ..task import merge as merge_task
from ..task.base_model import BaseModel
from ..task.delta import load_task, task_of
from ..task.intact import tuning_of
from .adapters import SptAdapters, trained_parameters
from .injection import registers_on_meta, tune
from .registration import PREFIX
from .weights import from_tensors, to_tensors


class SptModel(BaseTuner):
    """The tuner that `get_peft_model` makes of a model and an `SptConfig`.

    The model is tuned in place, as by `spt_kernels.apply`: its modules keep their names, and the
    deltas of the active adapter are in its weights. Of several adapters one is active at a time.
    One that is not active is set aside with its parameters, so that an optimizer of it stays valid;
    while adapters are disabled the model is the base model, bit for bit.

    What has no exact meaning for deltas within weights is refused by name: several active adapters,
    a batch that mixes them, `low_cpu_mem_usage`, injection without a `PeftModel`.

    Raises:
        BaseModelMismatch: the plan is for another model.
        ValueError: as `apply`; `modules_to_save` names what is not there, or what the plan trains.
    """

    prefix = PREFIX
    tuner_layer_cls = SptAdapters
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as PEFT declares it
    uses_shared_state = True
    active_adapter: str | list[str]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Tune the model by the plan of a new adapter; on an error it is as it was."""
        if low_cpu_mem_usage or registers_on_meta():
            raise ValueError(
                "low_cpu_mem_usage: expected False for SPT, whose parameters are a few entries of "
                "weights that are there"
            )
        if "spt" not in self._modules:
            self.spt = SptAdapters(adapter_name)
        config: Any = self.peft_config[adapter_name]
        is_active = adapter_name in self.active_adapters
        before, was_merged = self.spt.on_model, self.spt.merged
        with all_or_nothing() as undo:
            undo.callback(self.peft_config.pop, adapter_name, None)
            self.spt.put_on(model, None, undo)
            tune(model, config, undo)
            undo.callback(setattr, self.spt, "on_model", None)
            self.spt.on_model = adapter_name
            self._set_trainable(is_active and not config.inference_mode)
            if not is_active or self.spt.disable_adapters:
                self.spt.put_on(model, before, undo)
                if was_merged:
                    self.spt.merge_on(model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter be active, and trainable unless `inference_mode`.

        Raises:
            ValueError: there is none of this name, or several are given: deltas of two plans lie on
                the same entries of the same weights.
        """
        [name] = self._known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        others = [other for other in self.active_adapters if other != name]
        if not self.spt.disable_adapters:
            self.spt.put_on(self.model, name)
        self.active_adapter = self.spt._active_adapter = name
        for other in self.spt.aside.keys() & others:
            self.spt.freeze(other)
        self.set_requires_grad(name, not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let what adapters train be trainable, or freeze it."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            with self.spt.holding(self.model, name):
                self._set_trainable(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was the active one, the first of the others becomes so."""
        [name] = self._known([adapter_name])
        others = [other for other in self.peft_config if other != name]
        is_active = name in self.active_adapters
        if is_active and others:
            self.set_adapter(others[0])
            warnings.warn(f"{name} was the active adapter, {others[0]} is so now", stacklevel=2)
        self.spt.drop(self.model, name)
        del self.peft_config[name]
        if is_active and not others:
            self.active_adapter = self.spt._active_adapter = []

    def disable_adapter_layers(self) -> None:
        """Make the model the base model, bit for bit, until adapters are enabled again."""
        self.spt.put_on(self.model, None)
        self.spt._disable_adapters = True

    def enable_adapter_layers(self) -> None:
        """Put the active adapter on the model again."""
        self.spt._disable_adapters = False
        for name in self.active_adapters:
            self.spt.put_on(self.model, name)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fold the active adapter into the weights until `unmerge_adapter`, which is exact.

        Deltas are in the weights as it is; a LoRA costs nothing from here on. It takes a copy of
        every weight that the adapter changes.

        Raises:
            ValueError: the adapter is not the active one, or has an Adapter; adapters are disabled.
        """
        [name] = self._known(adapter_names or self.active_adapters)
        if name != self.spt.on_model:
            raise ValueError(f"merge_adapter: {name!r} is not the active adapter, or is disabled")
        if self.spt.merged:
            warnings.warn(f"{name} is merged already", stacklevel=2)
            return
        if safe_merge:
            _check_finite(self.model, name)
        self.spt.merge_on(self.model)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the bit; parameters are the very same."""
        if not self.spt.merged:
            warnings.warn("no adapter is merged", stacklevel=2)
        self.spt.unmerge(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *arguments: Any, adapter_names: list[str] | None = None, **named: Any
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError(
                "adapter_names: a batch cannot mix adapters, whose deltas are in the weights: run "
                "it adapter by adapter, with set_adapter"
            )
        yield

    def _unload_and_optionally_merge(  # type: ignore[override]  # theirs returns the model, too
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = self._known(adapter_names) if adapter_names else list(self.active_adapters)
        with self.spt.holding(self.model, names[0] if merge and names else None):
            if merge and names:
                if safe_merge:
                    _check_finite(self.model, names[0])
                merge_task(self.model)
                self.spt.on_model = None
            self.spt.aside.clear()  # so that nothing is put back, nor as disable_adapter ends
            self.active_adapter = self.spt._active_adapter = []
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _set_trainable(self, flag: bool) -> None:
        for parameter in trained_parameters(self.model):
            parameter.requires_grad_(flag)

    def _known(self, names: Sequence[str]) -> list[str]:
        """One name of an adapter in a list."""
        if len(names) != 1:
            raise ValueError(
                f"expected the name of one adapter, got {list(names)}: deltas are in the weights, "
                "and two plans may have some on the same entries"
            )
        if names[0] not in self.peft_config:
            raise ValueError(f"there is no adapter {names[0]!r}, but {sorted(self.peft_config)}")
        return list(names)

    def _create_and_replace(self, *arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError("a plan tunes a model as a whole: see inject_adapter")

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, *others: Any, **named: Any
    ) -> dict[str, Tensor]:
        tuner = _tuner_of(model)
        if adapter_name == tuner.spt.on_model and not tuner.spt.merged:
            _check_own(model, trained_parameters(tuner.model), state_dict)
        with tuner.spt.showing(tuner.model, adapter_name):
            classes = tuning_of(tuner.model).classes
            task = task_of(tuner.model, metadata={"classes": classes} if classes else {})
        config.plan = task.plan
        return to_tensors(task)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # there is none in it

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner = _tuner_of(model)
        try:
            tuner._load(adapter_name, state_dict)
        except BaseException:
            if config.is_read and not tuner._is_trained(adapter_name):  # it was made for these
                tuner.spt.drop(tuner.model, adapter_name)
                del tuner.peft_config[adapter_name]
            raise
        return {}  # for PEFT nothing is left to load

    def _load(self, name: str, tensors: dict[str, Tensor]) -> None:
        with self.spt.holding(self.model, name):
            plan = tuning_of(self.model).plan
            parameters = BaseModel.of(self.model).parameters
            task = from_tensors(tensors, plan, parameters, name)
            is_trainable = any(p.requires_grad for p in trained_parameters(self.model))
            load_task(self.model, task, f"adapter {name!r}")
            self._set_trainable(is_trainable)

    def _is_trained(self, name: str) -> bool:
        """Whether an adapter is anything else than it was when it was made."""
        with self.spt.showing(self.model, name):
            now = BaseModel.of(self.model)
            base = tuning_of(self.model).base_head
            zero: list[Any] = [d.delta for d in now.deltas.values() if not d.whole]
            for layer in now.structured.values():
                zero.append(layer.lora_b if isinstance(layer, LoraLayer) else layer.up_weight)
            same = all(torch.equal(now.parameters[n], base[n]) for n in base)
            return not same or any(bool(parameter.any()) for parameter in zero)


def _check_own(model: nn.Module, trained: Sequence[Tensor], given: Mapping[str, Any]) -> None:
    """Raise where a state dict that is to be saved has other values than are trained."""
    ours = {id(parameter) for parameter in trained}
    for name, own in model.named_parameters():
        value = given.get(name)
        if id(own) not in ours or not isinstance(value, Tensor) or not own.isfinite().all():
            continue
        if not torch.equal(own.detach().to(value), value):
            raise ValueError(
                f"state_dict: expected the model's own, got other values of {name}: an adapter is "
                "saved as the model has it, load them first, model.load_state_dict(state_dict)"
            )


def _check_finite(model: nn.Module, name: str) -> None:
    if not all(p.isfinite().all() for p in trained_parameters(model)):
        raise ValueError(f"safe_merge: adapter {name!r} has NaN or infinite values")


def _tuner_of(model: Any) -> SptModel:
    tuner = model if isinstance(model, SptModel) else model.base_model
    assert isinstance(tuner, SptModel)
    return tuner
