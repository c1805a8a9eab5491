"""What a profile counts, and which steps a row of the cost table runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from spt_kernels.costs import CostSetting, measure, step_profile
from spt_kernels.costs.measure import measure_row
from spt_kernels.costs.step_profile import StepProfile, profile_call
from tests.card.pretend import pretended_card

SIZES = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48}


def setting(**more: Any) -> CostSetting:
    return CostSetting(
        model="vit_tiny_patch16_224", model_args=SIZES, batch_size=2, timed_batch_size=2,
        num_classes=5, rounds=1, **more,
    )  # fmt: skip


def event(name: str, device: DeviceType, us: float, *, annotation: bool = False) -> Any:
    lasted = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(
        name=name, device_type=device, is_user_annotation=annotation, time_range=lasted
    )


class CardsProfile:
    """A profile of two operators and their three kernels, which an optimizer has named."""

    asked: ClassVar[list[set[ProfilerActivity]]] = []

    def __init__(self, activities: list[ProfilerActivity]) -> None:
        self.asked.append(set(activities))

    def __enter__(self) -> CardsProfile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[Any]:
        return [
            event("aten::mm", DeviceType.CPU, 30),
            event("spt::sparse_adamw", DeviceType.CPU, 20),
            event("cudaLaunchKernel", DeviceType.CPU, 5),
            event("Optimizer.step#AdamW.step", DeviceType.CUDA, 900, annotation=True),
            event("sm90_gemm", DeviceType.CUDA, 700),
            event("adamw_kernel", DeviceType.CUDA, 40),
            event("Memcpy HtoD", DeviceType.CUDA, 10),
        ]


def test_kernels_are_counted_without_what_only_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile, "profile", CardsProfile)
    assert profile_call(lambda: None, on_gpu=True) == StepProfile(2, 3, 0.75)
    assert CardsProfile.asked[-1] == {ProfilerActivity.CPU, ProfilerActivity.CUDA}


def test_a_cpu_has_operators_alone() -> None:
    x = torch.randn(3)
    assert profile_call(lambda: x.sin() + x.cos(), on_gpu=False) == StepProfile(3, 0, 0.0)


def test_a_row_of_a_card_has_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_card():
        monkeypatch.setattr(step_profile, "profile", CardsProfile)
        row = measure_row("linear", setting(device="cuda"))
        monkeypatch.undo()
    assert (row.operators, row.kernels, row.kernel_ms) == (2, 3, 0.75)


def test_a_compiled_row_is_of_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def remember(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", remember)
    row = measure_row("linear", setting(step="compiled"))
    assert len(compiled) == 2  # full tuning beside it
    assert row.step is not None
    assert row.operators > 0
    assert row.inference is None  # which is the plain model's
    assert row.tuning_peak_bytes == 0  # nothing accounts for what a compiler keeps


class Captured:
    """Stands in for `capture_step`, and trains eagerly."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype | None] = []

    def __call__(
        self, model: nn.Module, loss_fn: Callable[..., Any], optimizer: torch.optim.Optimizer,
        batch: tuple[torch.Tensor, ...], *, autocast: torch.dtype | None,
    ) -> Callable[..., Any]:  # fmt: skip
        assert all(group["capturable"] for group in optimizer.param_groups)
        self.dtypes.append(autocast)

        def step(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return loss_fn(model(images).float(), target)

        return step


@pytest.mark.parametrize(
    ("dtype", "autocast"), [("fp32", None), ("bf16-autocast", torch.bfloat16), ("bf16", None)]
)
def test_a_captured_row_is_of_a_captured_step(
    dtype: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Captured()
    monkeypatch.setattr(measure, "capture_step", capture)
    with pretended_card():
        row = measure_row("spt-unstructured", setting(device="cuda", step="captured", dtype=dtype))
    assert capture.dtypes == [autocast]
    assert row.step is not None


def test_a_step_that_cannot_be_captured_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the step waits for the card")

    monkeypatch.setattr(measure, "capture_step", refuse)
    with pretended_card(), pytest.raises(ValueError, match="step: cannot be captured: the step"):
        measure_row("linear", setting(device="cuda", step="captured"))


def test_steps_of_another_kind_have_a_table_of_their_own() -> None:
    eager, compiled = CostSetting(), CostSetting(step="compiled")
    assert eager.title() != compiled.title()
    assert eager.is_papers
    assert not compiled.is_papers
    assert eager.has_scores
    assert not compiled.has_scores
