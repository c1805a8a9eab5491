"""Measures one row of the cost table in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.lookup import settle_doubts
from ..memory import estimate_memory, made_up_plan
from ..methods import Method, tune
from ..methods.tunable import Tunable
from ..model import backbone_numel
from ..step import capture_step
from .row import CostRow, Spread
from .setting import CAPTURED, COMPILED, EAGER, CostSetting
from .step_profile import profile_call
from .timing import against, autocast, in_turn, make_batch

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
    tunable = tuned_for(name, plain, setting)
    row = CostRow(
        method=name,
        trained=tunable.trained,
        trained_share=tunable.trained / backbone_numel(plain),
        accounted_peak_bytes=_accounted(tunable, (setting.batch_size, *shape), setting),
    )
    row = _with_step(row, tunable, plain, shape, setting)
    tunable.model.zero_grad(set_to_none=True)
    row = replace(row, file_bytes=tunable.file_bytes())
    if setting.step != EAGER:
        return row
    # autocast keeps a cast copy of every weight that could be trained
    deployed = tunable.deployed().eval().requires_grad_(False)
    row = replace(row, inference_peak_bytes=_inference_peak(deployed, shape, setting))
    if not setting.rounds:
        return row
    inference, over_plain = _time_inference(deployed, plain, shape, setting)
    return replace(row, inference=inference, inference_over_plain=over_plain)


def _with_step(
    row: CostRow, tunable: Tunable, plain: nn.Module, shape: tuple[int, ...], setting: CostSetting
) -> CostRow:
    """What a training step takes."""
    if setting.on_gpu:
        return _with_step_on_gpu(row, tunable, shape, setting)
    # of a compiled step nothing accounts
    peak = row.accounted_peak_bytes if setting.step == EAGER else 0
    row = replace(row, tuning_peak_bytes=peak)
    if not setting.rounds:
        return row
    timed = _accounted(tunable, (setting.timed_batch_size, *shape), setting, device="cpu")
    if timed > LARGEST_PEAK_BYTES:
        wanted = f"{timed / 2**30:.0f} GiB at batch {setting.timed_batch_size}"
        return replace(row, note=f"not run: accounts for {wanted}")
    batch = setting.step_batch_size
    step = make_step(tunable, shape, batch, setting)
    full = make_step(tuned_for("full", plain, setting), shape, batch, setting)
    time, over_full = against(step, full, setting)
    seen = profile_call(step, on_gpu=False)
    return replace(row, step=time, step_over_full=over_full, operators=seen.operators)


def _with_step_on_gpu(
    row: CostRow, tunable: Tunable, shape: tuple[int, ...], setting: CostSetting
) -> CostRow:
    """Its peak and, without full tuning's model beside it, its time and kernels."""
    try:
        step = make_step(tunable, shape, setting.batch_size, setting)
        if setting.step != EAGER:
            step()  # compiles: what that takes in memory is not the step's
        peak = _allocated_peak([step] * 3)
    except torch.OutOfMemoryError:
        tunable.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return replace(row, note=f"out of memory at batch {setting.batch_size}")
    row = replace(row, tuning_peak_bytes=peak)
    if not setting.rounds:
        return row
    (time,) = in_turn([step], setting)
    return replace(row, step=time, **asdict(profile_call(step, on_gpu=True)))


def tune_for_costs(model: nn.Module, method: Method, image_shape: tuple[int, ...]) -> Tunable:
    """`model` tuned by `method`, which chooses, where it does, by made-up scores."""
    return tune(model, method, made_up_plan(model, method, image_shape))


def tuned_for(name: str, plain: nn.Module, setting: CostSetting) -> Tunable:
    """A tuned copy of `plain`, which changes only in dtype."""
    model = copy.deepcopy(plain)
    if setting.dtype == "bf16":
        model = model.bfloat16()
        plain.bfloat16()
    shape = setting.image_shape(plain)
    return tune_for_costs(model.to(setting.device), setting.method(name, plain), shape)


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


def _time_inference(
    model: nn.Module, plain: nn.Module, shape: tuple[int, ...], setting: CostSetting
) -> tuple[Spread, float]:
    """Per image."""
    batch = setting.step_batch_size
    plain = plain.to(setting.device).eval()
    ours, bare = (_inferrer(m, shape, batch, setting) for m in (model, plain))
    time, over_plain = against(ours, bare, setting)
    return time.each(batch), over_plain


def make_step(
    tunable: Tunable, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    """A training step, optimizer included, on one batch again and again.

    Raises:
        ValueError: it cannot be captured.
    """
    images, target = make_batch(shape, batch, setting)
    model = tunable.model.train()
    if setting.step == CAPTURED:
        return _captured(tunable, (images, target), setting)
    settle_doubts(model)  # the first steps of a loop that is not known take looks of their own
    optimizer = tunable.optimizer(fused=True)
    run = torch.compile(model) if setting.step == COMPILED else model

    def step() -> None:
        with autocast(setting):
            loss = F.cross_entropy(run(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _captured(
    tunable: Tunable, batch: tuple[Tensor, Tensor], setting: CostSetting
) -> Callable[[], object]:
    """The step as CUDA graphs."""
    dtype = torch.bfloat16 if setting.dtype == "bf16-autocast" else None
    optimizer = tunable.optimizer(capturable=True)
    try:
        step = capture_step(tunable.model, F.cross_entropy, optimizer, batch, autocast=dtype)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"step: cannot be captured: {error}") from error
    return lambda: step(*batch)


def _inferrer(
    model: nn.Module, shape: tuple[int, ...], batch: int, setting: CostSetting
) -> Callable[[], object]:
    images, _ = make_batch(shape, batch, setting)

    def infer() -> None:
        with torch.inference_mode(), autocast(setting):
            model(images)

    return infer
