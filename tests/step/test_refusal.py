"""What cannot be captured is named, with what to do instead, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spt_kernels as spt
from tests.card.pretend import pretended_card
from tests.models import tiny_batch, tiny_vit

from .runs import adamw, batches, tuned


def capture(model: nn.Module, optimizer: Any = None, **changed: Any) -> None:
    batch = changed.pop("batch", None) or batches(1, "cuda")[0]
    spt.capture_step(model, F.cross_entropy, optimizer or adamw(model), batch, **changed)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    with pretended_card():
        yield tuned("full", "cuda")


def test_a_model_on_the_cpu() -> None:
    model = tiny_vit(depth=1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"model: expected all of it on a CUDA device, .* on cpu"):
        spt.capture_step(model, F.cross_entropy, optimizer, tiny_batch())


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"batch": "images"}, TypeError, "batch: expected tensors, as"),
        ({"accumulate": 0}, ValueError, "accumulate: expected a whole number above zero, got 0"),
        ({"clip_grad": -1.0}, ValueError, r"clip_grad: expected a number above zero, got -1\.0"),
        ({"ragged": "drop"}, ValueError, "ragged: expected one of error, eager, got 'drop'"),
    ],
)
def test_bad_arguments(
    model: nn.Module, changed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        capture(model, **changed)


def test_things_that_are_something_else(model: nn.Module) -> None:
    batch = batches(1, "cuda")[0]
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got builtin"):
        spt.capture_step(F.gelu, F.cross_entropy, adamw(model), batch)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\..*, got list"):
        spt.capture_step(model, F.cross_entropy, [1], batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch\[1\]: expected a tensor on cuda:0, .* on cpu"):
        capture(model, batch=(batch[0], batch[1].cpu()))
    with pytest.raises(ValueError, match="model: expected one with parameters"):
        capture(nn.Identity(), adamw(model))
    model.register_buffer("stray", torch.ones(2))
    with pytest.raises(ValueError, match="on a CUDA device, stray is on cpu"):
        capture(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.AdamW, r"capturable=False.*make it with AdamW\(\.\.\., capturable=True\)"),
        (spt.SparseAdamW, r"make it with SparseAdamW\(\.\.\., capturable=True\)"),
        (torch.optim.SGD, r"fused=None.*make it with SGD\(\.\.\., fused=True\)"),
        (spt.OffloadedAdamW, "OffloadedAdamW has its state on the host"),
        (torch.optim.LBFGS, "LBFGS has no option capturable"),
    ],
)
def test_optimizers_that_read_numbers_from_the_host(
    model: nn.Module, make: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        capture(model, make(model.parameters(), lr=0.1))


def test_sgd_whose_rate_is_on_the_card(model: nn.Module) -> None:
    capture(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True))
    damped = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    with pytest.raises(RuntimeError, match="first value of the state 'momentum_buffer'"):
        capture(model, damped)


def test_a_scaler_that_waits(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    with pytest.raises(ValueError, match=r"scaler: AdamW lets .*AdamW\(\.\.\., fused=True\)"):
        capture(model, optimizer, scaler=torch.amp.GradScaler("cuda"))


def on_module(model: Any) -> Any:
    return model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None), "blocks.0.mlp.fc1"


def before_module(model: Any) -> Any:
    return model.head.register_forward_pre_hook(lambda *_: None), "head"


def in_backward(model: Any) -> Any:
    return model.head.register_full_backward_hook(lambda *_: None), "head"


def on_parameter(model: Any) -> Any:
    return model.head.weight.register_hook(lambda grad: grad), "head.weight"


def after_accumulation(model: Any) -> Any:
    return model.head.bias.register_post_accumulate_grad_hook(lambda _: None), "head.bias"


def on_every_module(model: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda *_: None), "every module"


def written_in_c(model: Any) -> Any:
    return model.head.weight.register_hook(torch.ones(5, 24).mul), "head.weight"


@pytest.mark.parametrize(
    "put",
    [on_module, before_module, in_backward, on_parameter, after_accumulation, on_every_module],
)
def test_hooks(model: nn.Module, put: Any) -> None:
    handle, name = put(model)
    try:
        with pytest.raises(ValueError, match=rf"^{name} has a hook, .*<lambda>.*allow_hooks=True"):
            capture(model)
    finally:
        handle.remove()
    capture(model)


@pytest.mark.parametrize(
    "put", [on_module, before_module, in_backward, on_parameter, on_every_module, written_in_c]
)
def test_hooks_that_are_put_on_later(model: nn.Module, put: Any) -> None:
    batch = batches(1, "cuda")[0]
    before_module(model)  # what is captured with it is no matter
    step = spt.capture_step(model, F.cross_entropy, adamw(model), batch, allow_hooks=True)
    step(*batch)
    handle, name = put(model)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"^{name} has a hook, .* after the step was c"):
                step(*batch)
    finally:
        handle.remove()
    step(*batch)


def test_hooks_of_the_optimizer_and_hooks_that_are_allowed(model: nn.Module) -> None:
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^optimizer has a hook"):
        capture(model, optimizer)
    capture(model, optimizer, allow_hooks=True)


def test_hooks_that_run_on_the_card_are_no_matter(model: nn.Module) -> None:
    weight: Any = model.head.weight  # as `dense-gradient` masks a gradient
    weight.register_hook(torch.ones_like(weight).mul)
    capture(model)


def test_within_autocast(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    with pytest.raises(ValueError, match="autocast is on: call capture_step outside"):
        capture(model)
