"""Measures one row of the cost table in this process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anatomy import candidate_names
from ..finetuning.methods import backbone_numel
from ..memory import estimate_memory
from ..sensitivity import measure_sensitivity
from .row import CostRow, SensitivitySpeed, Spread
from .setting import CostSetting
from .ways import WAYS, Prepared

# The published layer's backward holds nnz × nnz values: past this it is not run, only accounted.
LARGEST_PEAK_BYTES = 8 << 30

SENSITIVITY_BATCHES = 4  # of a measurement; timed from the end of the first to that of the last


def measure_row(way: str, setting: CostSetting) -> CostRow:
    """Prepare the model as `way` does, train a few steps, deploy it, and note what that takes.

    Raises:
        ValueError: no such way, or it cannot tune this architecture.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    plain = setting.build()
    shape = setting.image_shape(plain)
    prepared = _prepare(way, plain, setting)
    share = prepared.trained / backbone_numel(plain)
    peak, runnable, note = _tuning_peak(prepared, shape, setting)
    step = over_full = None
    if runnable:
        step, over_full = _time_steps(prepared, plain, shape, setting)
    file_bytes = prepared.file_bytes(prepared.model)
    prepared.optimizer.zero_grad(set_to_none=True)
    deployed = prepared.for_inference(prepared.model).eval()
    inference_peak = _inference_peak(deployed, shape, setting)
    inference, over_plain = _time_inference(deployed, plain, shape, setting)
    return CostRow(
        way=way,
        trained=prepared.trained,
        trained_share=share,
        inference=inference,
        inference_over_plain=over_plain,
        inference_peak_bytes=inference_peak,
        tuning_peak_bytes=peak,
        step=step,
        step_over_full=over_full,
        file_bytes=file_bytes,
        note=note,
    )


def measure_sensitivity_speed(setting: CostSetting) -> SensitivitySpeed:
    """Score the same samples in three ways, in turn."""
    model = setting.build().to(setting.device)
    size = setting.batch_size if setting.on_gpu else setting.timed_batch_size
    images, target = batch = _batch(setting.image_shape(model), size, setting)
    names = candidate_names(model)
    per_batch: list[float] = []  # seconds

    def exact() -> None:
        moments: list[float] = []

        def note(done: int, wanted: int) -> None:
            if setting.on_gpu:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

        measure_sensitivity(
            model,
            [batch] * SENSITIVITY_BATCHES,
            num_samples=SENSITIVITY_BATCHES * size,
            device=setting.device,
            progress=note,
        )
        per_batch.append((moments[-1] - moments[0]) / (len(moments) - 1))

    def loop() -> None:
        ones = zip(images.split(1), target.split(1), strict=True)
        square_batch_gradients(model, names, ones)

    def batch_squared() -> None:
        square_batch_gradients(model, names, [batch])

    _, one_by_one, squared = in_turn([exact, loop, batch_squared], setting.rounds, setting)
    return SensitivitySpeed(
        exact=size / statistics.median(per_batch[1:]),
        loop=1e3 * size / one_by_one.median_ms,
        batch_squared=1e3 * size / squared.median_ms,
        batch_size=size,
    )


def in_turn(runs: list[Callable[[], object]], rounds: int, setting: CostSetting) -> list[Spread]:
    """Each run once to warm up and then `rounds` times, in turn, so that noise meets them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for counted in [False] + [True] * rounds:
        for run, seen in zip(runs, times, strict=True):
            elapsed = _elapsed_ms(run, setting)
            if counted:
                seen.append(elapsed)
    return [Spread(statistics.median(seen), min(seen), max(seen)) for seen in times]


def _prepare(way: str, plain: nn.Module, setting: CostSetting) -> Prepared:
    model = copy.deepcopy(plain)
    if setting.dtype == "bf16":
        model = model.bfloat16()
        plain.bfloat16()
    model = model.to(setting.device)
    return WAYS[way](model, setting)


def _tuning_peak(
    prepared: Prepared, shape: tuple[int, ...], setting: CostSetting
) -> tuple[int, bool, str]:
    """Bytes at the setting's batch size, whether steps can be timed, and why not."""
    if setting.on_gpu:
        step = _stepper(prepared, shape, setting.batch_size, setting)
        try:
            return _allocated_peak([step] * 3), True, ""
        except torch.OutOfMemoryError:
            prepared.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return 0, False, f"out of memory at batch {setting.batch_size}"
    # the weights have their dtype already; the batch takes it from them
    peak = _accounted(prepared, (setting.batch_size, *shape), setting)
    timed = _accounted(prepared, (setting.timed_batch_size, *shape), setting)
    if timed > LARGEST_PEAK_BYTES:
        wanted = f"{timed / 2**30:.0f} GiB at batch {setting.timed_batch_size}"
        return peak, False, f"not run: accounts for {wanted}"
    return peak, True, ""


def _accounted(prepared: Prepared, shape: tuple[int, ...], setting: CostSetting) -> int:
    return estimate_memory(prepared.model, shape, dtype=setting.dtype).peak_bytes


def _inference_peak(model: nn.Module, shape: tuple[int, ...], setting: CostSetting) -> int:
    if not setting.on_gpu:
        estimate = estimate_memory(
            model, (setting.batch_size, *shape), dtype=setting.dtype, training=False
        )
        return estimate.peak_bytes
    return _allocated_peak([_inferrer(model, shape, setting.batch_size, setting)] * 2)


def _allocated_peak(runs: Iterable[Callable[[], object]]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for run in runs:
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _time_steps(
    prepared: Prepared, plain: nn.Module, shape: tuple[int, ...], setting: CostSetting
) -> tuple[Spread, float | None]:
    """A step's time, and on a CPU its ratio to full tuning's: a card may not hold both models."""
    batch = setting.batch_size if setting.on_gpu else setting.timed_batch_size
    step = _stepper(prepared, shape, batch, setting)
    if setting.on_gpu:
        return in_turn([step], setting.rounds, setting)[0], None
    rival = WAYS["full"](copy.deepcopy(plain), setting)
    ours, full = in_turn([step, _stepper(rival, shape, batch, setting)], setting.rounds, setting)
    return ours, ours.median_ms / full.median_ms


def _time_inference(
    model: nn.Module, plain: nn.Module, shape: tuple[int, ...], setting: CostSetting
) -> tuple[Spread, float]:
    """Per image."""
    batch = setting.batch_size if setting.on_gpu else setting.timed_batch_size
    plain = plain.to(setting.device).eval()
    runs = [_inferrer(m, shape, batch, setting) for m in (model, plain)]
    ours, bare = in_turn(runs, setting.rounds, setting)
    each = Spread(*(ms / batch for ms in (ours.median_ms, ours.min_ms, ours.max_ms)))
    return each, ours.median_ms / bare.median_ms


def _stepper(
    prepared: Prepared, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    images, target = _batch(shape, batch, setting)
    prepared.model.train()

    def step() -> None:
        with _autocast(setting):
            loss = F.cross_entropy(prepared.model(images), target)
        loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad(set_to_none=True)

    return step


def _inferrer(
    model: nn.Module, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    images, _ = _batch(shape, batch, setting)

    def infer() -> None:
        with torch.inference_mode(), _autocast(setting):
            model(images)

    return infer


def _batch(shape: tuple[int, ...], batch: int, setting: CostSetting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=generator)
    target = torch.randint(setting.num_classes, (batch,), generator=generator)
    if setting.dtype == "bf16":
        images = images.bfloat16()
    return images.to(setting.device), target.to(setting.device)


def _autocast(setting: CostSetting) -> Any:
    kind = torch.device(setting.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=setting.dtype == "bf16-autocast")


def square_batch_gradients(
    model: nn.Module, names: list[str], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """`Σ g²` over batches, g the gradient of a batch's mean loss."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name].requires_grad_() for name in names]
    scores = [torch.zeros_like(parameter) for parameter in chosen]
    for images, target in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(images), target), chosen)
        for score, grad in zip(scores, grads, strict=True):
            score.addcmul_(grad, grad)
    return dict(zip(names, scores, strict=True))


def _elapsed_ms(run: Callable[[], object], setting: CostSetting) -> float:
    if not setting.on_gpu:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
