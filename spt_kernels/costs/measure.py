"""Measures one row of the cost table in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

from ..memory import estimate_memory
from ..methods import Method, make_plan, tune
from ..methods.tunable import Tunable
from ..model import backbone_numel
from ..sensitivity import skewed_sensitivity
from .row import CostRow, Spread
from .setting import CostSetting
from .timing import autocast, in_turn, make_batch

# A step that takes more of a CPU's memory is not run, only accounted, as the published layer's,
# whose backward holds nnz × nnz values.
LARGEST_PEAK_BYTES = 8 << 30


def measure_row(name: str, setting: CostSetting) -> CostRow:
    """Tune the model by the method called `name`, train a few steps, deploy it, note the cost.

    Raises:
        ValueError: no such method, or it cannot tune this architecture.
    """
    plain = setting.build()
    shape = setting.image_shape(plain)
    tunable = _tuned(name, plain, setting)
    share = tunable.trained / backbone_numel(plain)
    accounted = _accounted(tunable, (setting.batch_size, *shape), setting)
    peak, runnable, note = _tuning_peak(tunable, shape, setting, accounted)
    step = over_full = None
    if runnable and setting.rounds:
        step, over_full = _time_steps(tunable, plain, shape, setting)
    tunable.model.zero_grad(set_to_none=True)
    file_bytes = tunable.file_bytes()
    # autocast keeps a cast copy of every weight that could be trained
    deployed = tunable.deployed().eval().requires_grad_(False)
    inference_peak = _inference_peak(deployed, shape, setting)
    inference = over_plain = None
    if setting.rounds:
        inference, over_plain = _time_inference(deployed, plain, shape, setting)
    return CostRow(
        method=name,
        trained=tunable.trained,
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


def tune_for_costs(model: nn.Module, method: Method) -> Tunable:
    """`model` tuned by `method`, which chooses, where it does, by made-up scores."""
    scores = skewed_sensitivity(model) if method.is_sensitivity_aware else None
    return tune(model, method, make_plan(model, method, scores))


def _tuned(name: str, plain: nn.Module, setting: CostSetting) -> Tunable:
    """A tuned copy of `plain`, which changes only in dtype."""
    model = copy.deepcopy(plain)
    if setting.dtype == "bf16":
        model = model.bfloat16()
        plain.bfloat16()
    return tune_for_costs(model.to(setting.device), setting.method(name, plain))


def _tuning_peak(
    tunable: Tunable, shape: tuple[int, ...], setting: CostSetting, accounted: int
) -> tuple[int, bool, str]:
    """Bytes at the setting's batch size, whether steps can be timed, and why not."""
    if setting.on_gpu:
        step = make_step(tunable, shape, setting.batch_size, setting)
        try:
            return _allocated_peak([step] * 3), True, ""
        except torch.OutOfMemoryError:
            tunable.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return 0, False, f"out of memory at batch {setting.batch_size}"
    if not setting.rounds:
        return accounted, False, ""
    timed = _accounted(tunable, (setting.timed_batch_size, *shape), setting, device="cpu")
    if timed > LARGEST_PEAK_BYTES:
        wanted = f"{timed / 2**30:.0f} GiB at batch {setting.timed_batch_size}"
        return accounted, False, f"not run: accounts for {wanted}"
    return accounted, True, ""


def _accounted(
    tunable: Tunable, shape: tuple[int, ...], setting: CostSetting, device: str = "cuda"
) -> int:
    return estimate_memory(tunable.model, shape, dtype=setting.dtype, device=device).peak_bytes


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
    tunable: Tunable, plain: nn.Module, shape: tuple[int, ...], setting: CostSetting
) -> tuple[Spread, float | None]:
    """A step's time, and on a CPU its ratio to full tuning's: a card may not hold both models."""
    batch = setting.step_batch_size
    step = make_step(tunable, shape, batch, setting)
    if setting.on_gpu:
        return in_turn([step], setting)[0], None
    full = make_step(_tuned("full", plain, setting), shape, batch, setting)
    ours, theirs = in_turn([step, full], setting)
    return ours, ours.median_ms / theirs.median_ms


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
    tunable: Tunable, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    """A training step, optimizer included, on one batch again and again."""
    images, target = make_batch(shape, batch, setting)
    model = tunable.model.train()
    optimizer = tunable.optimizer(fused=True)

    def step() -> None:
        with autocast(setting):
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _inferrer(
    model: nn.Module, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    images, _ = make_batch(shape, batch, setting)

    def infer() -> None:
        with torch.inference_mode(), autocast(setting):
            model(images)

    return infer
