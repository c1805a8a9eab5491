"""What a run tells of itself: what is trained, on which machine, in how much memory."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from ... import __version__
from ...memory import estimate_memory
from ...methods.tunable import Tunable, make_optimizer
from ...model import backbone_numel, head_names, head_numel
from ...model.head import layers_of
from ...offloading import OffloadWords
from ...plan import LoraSpec, Plan
from ..images.labelled import named_images
from ..job.job import plain
from ..job.recipe import Recipe
from .same_inputs import CLASSES, IMAGES, WEIGHTS, told_of_images, told_of_weights
from .setting import Setting


def facts_of(
    setting: Setting, plan: Plan | None, head: str | tuple[str, ...] | None
) -> dict[str, Any]:
    """What is trained, on what; told from the plain model, whose head is as `head_names` has it."""
    model = setting.base.model
    return {
        **parameters_of(model, plan, head),
        "head": layers_of(head_names(model, head)),
        "lr": setting.job.recipe.peak_lr(setting.job.method),
        "drop_path": setting.base.drop_path,
        "images": {
            name: len(images)
            for name in ("train", "val", "test")
            if (images := getattr(setting.splits, name)) is not None
        },
    }


def parameters_of(
    model: nn.Module, plan: Plan | None, head: str | tuple[str, ...] | None
) -> dict[str, Any]:
    """How many parameters a plain model has, and a plan trains of them."""
    return {
        "unstructured_parameters": None if plan is None else plan.num_unstructured,
        "structured_parameters": None if plan is None else plan.num_structured,
        "head_parameters": head_numel(model, head),
        "backbone_parameters": backbone_numel(model, head),
        "budget": None if plan is None else plan.budget,
    }


def trains(setting: Setting, trained: int, facts: dict[str, Any], plan: Plan | None) -> list[str]:
    """What the method trains and its share of the model, as lines."""
    method = setting.job.method
    share = 100 * trained / facts["backbone_parameters"]
    parts = [f"{method.name} trains {trained:,} parameters, {share:.2f} % of the backbone"]
    if plan is not None:
        parts += _parts_of(plan)
    lines = [f"{'; '.join(parts)}; {_head_of(facts)}"]
    if plan is not None and plan.shortfall:
        lines.append(plan.shortfall)
    if method.name == "lora" and method.budget is None:
        lines.append("lora without a budget is sized by its rank; spt-* would get 0.5 %")
    return lines


def _head_of(facts: dict[str, Any]) -> str:
    if not facts["head"]:
        return "and no head"
    return f"and the head, {', '.join(facts['head'])}, of {facts['head_parameters']:,}"


def _parts_of(plan: Plan) -> list[str]:
    parts = []
    for kind, specs in (
        ("LoRA", [s for s in plan.structured.values() if isinstance(s, LoraSpec)]),
        ("Adapter", [s for s in plan.structured.values() if not isinstance(s, LoraSpec)]),
    ):
        if specs:
            number = sum(len(spec.rows) for spec in specs)
            on = "matrix" if number == 1 else "matrices"
            parts.append(f"{kind} of rank {specs[0].rank} on {number} {on}")
    if plan.num_unstructured:
        tensors = sum(positions.numel() > 0 for positions in plan.unstructured.values())
        parts.append(f"{plan.num_unstructured:,} single entries of {tensors} tensors")
    return parts


def accounted_bytes(setting: Setting, recipe: Recipe, tunable: Tunable) -> int:
    """The peak of a training step, of one process where several share it."""
    shape = setting.images_in_a_step, *setting.form.image_shape
    how = accounted_how(recipe, setting.device)
    estimate = estimate_memory(tunable.model, shape, micro_batch=recipe.micro_batch, **how)
    return estimate.peak_bytes


def accounted_how(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The arguments of `estimate_memory` that say how a recipe's steps are taken on a device."""
    return {
        "dtype": "bf16-autocast" if recipe.amp == "bf16" else "fp32",
        "device": accounted_device(device),
        **accounted_offload(OffloadWords.parse(recipe.offload)),
    }


def accounted_offload(away: OffloadWords) -> dict[str, Any]:
    """Those that say what is on the host."""
    how: dict[str, Any] = {"offload": away.weights}
    if away.state:
        how["optimizer"] = partial(make_optimizer, lr=1e-3, weight_decay=0.0, state_on_host=True)
    return how


def accounted_device(device: torch.device) -> str:
    """The kind of a device, likewise."""
    return "cuda" if device.type == "cuda" else "cpu"


def measured_bytes(device: torch.device) -> int | None:
    """The peak of this process on the card, `None` without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def machine_of(device: torch.device) -> dict[str, Any]:
    """Where it ran, and on which versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"spt_kernels": __version__, "torch": torch.__version__},
    }


def config_of(setting: Setting) -> dict[str, Any]:
    """All that it takes to build the run's model and to go on with the run."""
    return {
        "job": setting.job.to_json(),
        CLASSES: list(setting.splits.train.classes),
        IMAGES: told_of_images(*map(named_images, (setting.splits.train, setting.splits.val))),
        WEIGHTS: told_of_weights(setting.job.model, setting.base.model),
        "preprocessing": plain(asdict(setting.form)),
        "head_is_new": setting.base.head_is_new,
        "version": __version__,
    }
