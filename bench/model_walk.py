"""One family of timm's models walked through, from its sensitivities to a loaded task file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.finetuning.base.models import (
    ModelSource,
    build,
    preprocessing_of,
    sized_for,
)
from spt_kernels.model import backbone_numel, head_numel

SIZES = (64, 96, 128, 160, 192)  # the first at which a model runs is taken, else its own
NUM_CLASSES = 5
BATCH = 2
SAMPLES = 2
BUDGET = 0.005
RANK = 4


def walk(family: str, tell: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """What came of the smallest model of `family`, and is told at each stage.

    Args:
        family: a name of `timm.list_modules()`.
        tell: given what is known so far and the `stage` that begins.

    Raises:
        ValueError, RuntimeError and so on: whatever a user would have met.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def _at(stage: str, **so_far: Any) -> None:
        tell({"stage": stage, **so_far})

    _at("finding its smallest model")
    name, numel = smallest(family)
    row: dict[str, Any] = {"model": name, "parameters": numel}
    _at("building it", **row)
    model, size = runnable(name)
    row["image"] = size
    images = torch.randn(SAMPLES, model_channels(model), size, size)
    labels = torch.arange(SAMPLES) % NUM_CLASSES
    base = {key: value.clone() for key, value in model.state_dict().items()}

    _at("measuring its sensitivities", **row)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    measured = spt.measure_sensitivity(model, batches, num_samples=SAMPLES, progress=False)
    row["candidates"] = sum(score.numel() for score in measured.values())
    row["backbone"] = backbone_numel(model)
    row["head"] = head_numel(model)
    row["one_by_one"] = len(measured.fallback)
    row["kinds"] = dict(Counter(measured.info[key].kind for key in measured))

    _at("allocating", **row)
    plan = spt.allocate(measured, budget=BUDGET, structured="lora", rank=RANK)
    row["structured"] = len(plan.structured)
    row["unstructured"] = len(plan.unstructured)
    row["trained"] = plan.num_trainable

    _at("tuning it", **row)
    spt.apply(model, plan)
    loss = step(model, images[:BATCH], labels[:BATCH])
    if not loss < float("inf"):
        raise ValueError(f"the loss of a step is {loss}")

    _at("saving and loading the task", **row)
    tuned = answers(model, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.safetensors"
        spt.save_delta(model, file)
        row["task_bytes"] = file.stat().st_size
        other, _ = runnable(name, size)
        other.load_state_dict(base)
        plain = answers(other, images)
        spt.load_delta(other, file)
    if torch.equal(tuned, plain):
        raise ValueError("a step changed nothing of what it answers")
    if not torch.equal(answers(other, images), tuned):
        raise ValueError("a loaded task answers otherwise than the tuned model")
    return row


def smallest(family: str) -> tuple[str, int]:
    """The model of a family with the fewest parameters, and how many.

    Raises:
        ValueError: none of them can be built.
    """
    counts: dict[str, int] = {}
    for name in timm.list_models(module=family, exclude_filters="test_*"):  # of timm's own tests
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=NUM_CLASSES)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            continue  # it is built otherwise than for classes, or looks at values
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    if not counts:
        raise ValueError("none of its models can be built for image classification")
    name = min(counts, key=lambda name: (counts[name], name))
    return name, counts[name]


def runnable(name: str, size: int | None = None) -> tuple[nn.Module, int]:
    """A model with values and the smallest size of images at which it runs, or at `size`."""
    sizes = SIZES if size is None else (size,)
    for side in (*sizes, None):
        try:
            source = sized_for(ModelSource(name), NUM_CLASSES, side)
            model = build(source, NUM_CLASSES).model
            own = preprocessing_of(model, size=side).size
            answers(model, torch.randn(2, model_channels(model), own, own))
        except (ValueError, RuntimeError, AssertionError, IndexError):
            if side is None:
                raise
            continue
        # norms, scales and heads that start at zero would stop every gradient, as training has not
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        return model, own
    raise AssertionError("the loop returns or raises")


def model_channels(model: nn.Module) -> int:
    """Of its images."""
    return len(preprocessing_of(model).mean)


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of images, which must be one row of numbers each."""
    with torch.no_grad():
        out = model.eval()(images)
    if not isinstance(out, Tensor) or out.shape != (len(images), NUM_CLASSES):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"it answers {got}, not {NUM_CLASSES} numbers for each image")
    return out


def step(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """One training step, as `finetune` does them."""
    optimizer = spt.SparseAdamW(spt.param_groups(model, weight_decay=1e-4), lr=1e-2)
    loss = F.cross_entropy(model.train()(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()
