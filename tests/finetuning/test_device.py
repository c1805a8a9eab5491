"""Where a run computes: the same bits each time, or a word about what cannot give them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spt_kernels.finetuning import FinetuneJob, ImageSource, ModelSource, Recipe, finetune
from spt_kernels.finetuning.device import reproducible
from spt_kernels.finetuning.training import loop
from tests.methods import every

from .undrawn import draw_nothing

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def put_somewhere(tensor: Tensor) -> Tensor:
    """The same values, by an operation that torch has no deterministic implementation of."""
    indices = torch.arange(tensor.numel()).view(tensor.shape)
    return torch.zeros_like(tensor).put(indices, tensor)


def flags() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@pytest.mark.parametrize("setting", [None, ":16:8"])
@pytest.mark.parametrize("strictly", [False, True])
def test_flags_and_the_environment_are_as_before(
    strictly: bool, setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    if setting is not None:
        monkeypatch.setenv(CUBLAS, setting)
    before = flags()
    with contextlib.suppress(KeyError), reproducible(strictly=strictly):
        assert flags() == (True, not strictly)
        assert os.environ[CUBLAS] == (setting or ":4096:8")
        raise KeyError
    assert flags() == before
    assert os.environ.get(CUBLAS) == setting


def test_what_has_no_fixed_order_is_named_or_warned_of() -> None:
    before = flags()
    with (
        pytest.raises(ValueError, match="torch has no deterministic implementation of put_ "),
        reproducible(strictly=True),
    ):
        put_somewhere(torch.ones(3))
    assert flags() == before
    with reproducible(), pytest.warns(UserWarning, match="put_ does not have a deterministic"):
        put_somewhere(torch.ones(3))


def test_cublas_that_was_set_up_before_is_told() -> None:
    with (
        pytest.raises(ValueError, match="set CUBLAS_WORKSPACE_CONFIG="),
        reproducible(strictly=True),
    ):
        raise RuntimeError(
            "this operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2. "
            "To enable deterministic behavior in this case, you must set an environment variable "
            "before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8"
        )


@pytest.mark.parametrize("strictly", [False, True])
def test_any_other_error_is_what_it_was(strictly: bool) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="too much"), reproducible(strictly=strictly):
        raise torch.OutOfMemoryError("too much")


def test_a_strict_run(
    place: Path, task: ImageSource, base: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains the same; is refused where it cannot; and goes on without."""
    draw_nothing(monkeypatch)
    job = FinetuneJob(base, task, every.method("spt-lora", 400), Recipe(epochs=2, batch_size=8))
    finetune(job, place / "plain")
    expected = (place / "plain" / "task.safetensors").read_bytes()
    finetune(job, place / "strict", deterministic=True)
    assert (place / "strict" / "task.safetensors").read_bytes() == expected

    def in_no_order(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
        loss_fn = made(smoothing)
        return lambda scores, labels: loss_fn(put_somewhere(scores), labels)

    made = loop.classification_loss
    monkeypatch.setattr(loop, "classification_loss", in_no_order)
    with pytest.raises(ValueError, match="torch has no deterministic implementation of put_ "):
        finetune(job, place / "refused", deterministic=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="put_ does not have a deterministic")
        finetune(job, place / "refused", resume=True)
    assert (place / "refused" / "task.safetensors").read_bytes() == expected
