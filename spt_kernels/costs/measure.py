"""Measures one row of the cost table in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

from ..memory import estimate_memory
from ..method_plan import backbone_numel
from .peers import accountable
from .prepared import Prepared
from .row import CostRow, Spread
from .setting import CostSetting
from .timing import autocast, in_turn, make_batch
from .ways import WAYS

# A step that takes more of a CPU's memory is not run, only accounted, as the published layer's,
# whose backward holds nnz × nnz values.
LARGEST_PEAK_BYTES = 8 << 30


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
    accounted = _accounted(prepared, (setting.batch_size, *shape), setting)
    peak, runnable, note = _tuning_peak(prepared, shape, setting, accounted)
    step = over_full = None
    if runnable and setting.rounds:
        step, over_full = _time_steps(prepared, plain, shape, setting)
    file_bytes = prepared.file_bytes(prepared.model)
    prepared.optimizer.zero_grad(set_to_none=True)
    # autocast keeps a cast copy of every weight that could be trained
    deployed = prepared.for_inference(prepared.model).eval().requires_grad_(False)
    inference_peak = _inference_peak(deployed, shape, setting)
    inference = over_plain = None
    if setting.rounds:
        inference, over_plain = _time_inference(deployed, plain, shape, setting)
    return CostRow(
        way=way,
        trained=prepared.trained,
        trained_share=share,
        inference=inference,
        inference_over_plain=over_plain,
        inference_peak_bytes=inference_peak,
        tuning_peak_bytes=peak,
        accounted_peak_bytes=accounted,
        step=step,
        step_over_full=over_full,
        file_bytes=file_bytes,
        note=note,
    )


def _prepare(way: str, plain: nn.Module, setting: CostSetting) -> Prepared:
    model = copy.deepcopy(plain)
    if setting.dtype == "bf16":
        model = model.bfloat16()
        plain.bfloat16()
    model = model.to(setting.device)
    return WAYS[way](model, setting)


def _tuning_peak(
    prepared: Prepared, shape: tuple[int, ...], setting: CostSetting, accounted: int
) -> tuple[int, bool, str]:
    """Bytes at the setting's batch size, whether steps can be timed, and why not."""
    if setting.on_gpu:
        step = make_step(prepared, shape, setting.batch_size, setting)
        try:
            return _allocated_peak([step] * 3), True, ""
        except torch.OutOfMemoryError:
            prepared.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return 0, False, f"out of memory at batch {setting.batch_size}"
    if not setting.rounds:
        return accounted, False, ""
    timed = _accounted(prepared, (setting.timed_batch_size, *shape), setting, device="cpu")
    if timed > LARGEST_PEAK_BYTES:
        wanted = f"{timed / 2**30:.0f} GiB at batch {setting.timed_batch_size}"
        return accounted, False, f"not run: accounts for {wanted}"
    return accounted, True, ""


def _accounted(
    prepared: Prepared, shape: tuple[int, ...], setting: CostSetting, device: str = "cuda"
) -> int:
    with accountable(prepared.model) as model:
        return estimate_memory(model, shape, dtype=setting.dtype, device=device).peak_bytes


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
    batch = setting.step_batch_size
    step = make_step(prepared, shape, batch, setting)
    if setting.on_gpu:
        return in_turn([step], setting)[0], None
    rival = WAYS["full"](copy.deepcopy(plain), setting)
    ours, full = in_turn([step, make_step(rival, shape, batch, setting)], setting)
    return ours, ours.median_ms / full.median_ms


def _time_inference(
    model: nn.Module, plain: nn.Module, shape: tuple[int, ...], setting: CostSetting
) -> tuple[Spread, float]:
    """Per image."""
    batch = setting.step_batch_size
    plain = plain.to(setting.device).eval()
    runs = [_inferrer(m, shape, batch, setting) for m in (model, plain)]
    ours, bare = in_turn(runs, setting)
    return ours.each(batch), ours.median_ms / bare.median_ms


def make_step(
    prepared: Prepared, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    """A training step, optimizer included, on one batch again and again."""
    images, target = make_batch(shape, batch, setting)
    prepared.model.train()

    def step() -> None:
        with autocast(setting):
            loss = F.cross_entropy(prepared.model(images), target)
        loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad(set_to_none=True)

    return step


def _inferrer(
    model: nn.Module, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    images, _ = make_batch(shape, batch, setting)

    def infer() -> None:
        with torch.inference_mode(), autocast(setting):
            model(images)

    return infer
