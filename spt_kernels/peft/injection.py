"""How a model takes a new adapter: by its plan, with the modules that are trained besides."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..layers import all_or_nothing
from ..model.quantized import quantized_names
from ..plan import Plan
from ..task.base_model import BaseModel
from ..task.intact import tuning_of
from ..task.transfer import drop, train_besides
from ..tuning import apply
from .config import SptConfig


def tune(model: nn.Module, config: SptConfig, undo: ExitStack) -> None:
    """Give a plain model the task of a new adapter, or take over what it is tuned by.

    Args:
        model: on an error it is as it was.
        config: its plan is completed.
        undo: of a larger exchange: takes the way back.
    """
    if config.plan is None and not hasattr(model, "spt_tuning"):
        raise ValueError(
            "plan: expected a Plan in the SptConfig, got None; one that PeftConfig has read lacks "
            "its plan, SptConfig.from_pretrained reads both"
        )
    for name, quantized in quantized_names(model).items():
        raise ValueError(
            f"{name} is quantized to {quantized}, and an SptModel writes adapters into weights: "
            "tune it without PEFT, spt.apply(model, plan), or take PEFT's own LoRA"
        )
    besides = _modules_to_save(model, config)
    with all_or_nothing(undo) as steps:
        if isinstance(config.plan, Plan):
            apply(model, config.plan)
            steps.callback(lambda: drop(model, BaseModel.of(model)))
        train_besides(model, besides)
    config.plan = tuning_of(model).plan


def _modules_to_save(model: nn.Module, config: SptConfig) -> set[str]:
    """Names of the parameters of the modules that a configuration wants trained whole."""
    now = BaseModel.of(model)
    plan: Any = config.plan or tuning_of(model).plan
    found: set[str] = set()
    for wanted in config.modules_to_save or ():
        modules = [name for name, _ in model.named_modules() if name.endswith(wanted)]
        own = {n for n in now.parameters if any(n.startswith(f"{m}.") for m in modules)}
        if not own:
            raise ValueError(
                f"modules_to_save: no module of {type(model).__name__} ends in {wanted!r} and has "
                "parameters of its own"
            )
        clash = sorted(own & {*plan.unstructured, *plan.structured})
        if clash:
            raise ValueError(
                f"modules_to_save: {wanted!r} has {clash[0]}, of which the plan trains a part: "
                "leave it out, or out of the plan by exclude=... in measure_sensitivity"
            )
        found |= own
    return found - set(plan.head)


def registers_on_meta() -> bool:
    """Whether modules are made without values just now, as `low_cpu_mem_usage` has it."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(1)))
    return bool(probe.probe.is_meta)
