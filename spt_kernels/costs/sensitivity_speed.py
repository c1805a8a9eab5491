"""How fast a sample's gradients are squared: ours beside the loop and what others would do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from ..model import candidate_names
from ..sensitivity import measure_sensitivity
from .row import Spread
from .setting import CostSetting
from .timing import in_turn, make_batch

EXACT = "measure_sensitivity"
LOOP = "a batch of one at a time"
VMAP = "torch.func.vmap of grad"
BATCH_SQUARED = "batch gradients squared"  # as published: not the same quantity

BATCHES = 4  # of a measurement; timed from the end of the first to that of the last
VMAP_CHUNK = 4  # samples whose gradients are all in memory at once


@dataclass(frozen=True)
class SensitivitySpeed:
    """Time per sample of several ways to score every candidate parameter.

    Attributes:
        per_sample: way -> milliseconds for one sample. `EXACT` is counted once it runs: the probe
            of two samples before it is apart. `LOOP` and `VMAP` give the same numbers,
            `BATCH_SQUARED` another quantity.
        batch_size: of all but the loop.
        missing: way -> why it was not timed.
    """

    per_sample: Mapping[str, Spread]
    batch_size: int
    missing: Mapping[str, str]

    def seconds(self, samples: int, way: str = EXACT) -> float:
        """For so many samples."""
        return samples * self.per_sample[way].median_ms / 1e3

    def per_second(self, way: str) -> float:
        """Samples."""
        return 1e3 / self.per_sample[way].median_ms

    def ours_over(self, way: str) -> float:
        """The time of `EXACT` over that of another way."""
        return self.per_sample[EXACT].median_ms / self.per_sample[way].median_ms

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> SensitivitySpeed:
        """The inverse of `asdict`."""
        per_sample = {way: Spread(**spread) for way, spread in value["per_sample"].items()}
        return SensitivitySpeed(per_sample, value["batch_size"], value["missing"])


def measure_sensitivity_speed(setting: CostSetting) -> SensitivitySpeed:
    """Score the same samples in each way, in turn, in fp32 whatever the steps are timed in.

    Raises:
        ValueError: the setting has no rounds to time.
    """
    if not setting.rounds:
        raise ValueError("rounds must be at least 1 to time anything, got 0")
    setting = replace(setting, dtype="fp32")
    model = setting.build().to(setting.device)
    size = setting.step_batch_size
    images, target = batch = make_batch(setting.image_shape(model), size, setting)
    names = candidate_names(model)
    exact_ms: list[float] = []

    def exact() -> None:
        moments: list[float] = []

        def note(done: int, wanted: int) -> None:
            if setting.on_gpu:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

        measure_sensitivity(
            model,
            [batch] * BATCHES,
            num_samples=BATCHES * size,
            device=setting.device,
            progress=note,
        )
        exact_ms.append(1e3 * (moments[-1] - moments[0]) / (len(moments) - 1))

    def loop() -> None:
        ones = zip(images.split(1), target.split(1), strict=True)
        square_batch_gradients(model, names, ones)

    rivals: dict[str, Callable[[], object]] = {
        LOOP: loop,
        VMAP: lambda: square_with_vmap(model, names, batch),
        BATCH_SQUARED: lambda: square_batch_gradients(model, names, [batch]),
    }
    missing = _without_memory(rivals) if setting.on_gpu else {}
    rivals = {way: run for way, run in rivals.items() if way not in missing}
    _, *spreads = in_turn([exact, *rivals.values()], setting)
    per_sample = {EXACT: Spread.of(exact_ms[1:]).each(size)}
    for way, spread in zip(rivals, spreads, strict=True):
        per_sample[way] = spread.each(size)
    return SensitivitySpeed(per_sample, size, missing)


def square_batch_gradients(
    model: nn.Module, names: list[str], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """`Σ g²` over batches, g the gradient of a batch's mean loss."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name].requires_grad_() for name in names]
    scores = [torch.zeros_like(parameter) for parameter in chosen]
    for images, target in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(images), target), chosen)
        for score, gradient in zip(scores, grads, strict=True):
            score.addcmul_(gradient, gradient)
    return dict(zip(names, scores, strict=True))


def square_with_vmap(
    model: nn.Module, names: list[str], batch: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """`Σ g²` over samples, each chunk's gradients in memory at once."""
    frozen = {name: value.detach() for name, value in model.named_parameters()}
    chosen = {name: frozen.pop(name) for name in names}
    scores = {name: torch.zeros_like(value) for name, value in chosen.items()}

    def loss(chosen: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = functional_call(model, {**frozen, **chosen}, (image[None],))
        return F.cross_entropy(output, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for images, target in zip(*(part.split(VMAP_CHUNK) for part in batch), strict=True):
        for name, gradient in each(chosen, images, target).items():
            scores[name] += gradient.square_().sum(0)
    return scores


def _without_memory(rivals: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Which of them a card has no room for."""
    missing = {}
    for way, run in rivals.items():
        try:
            run()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            missing[way] = "out of memory"
    return missing
