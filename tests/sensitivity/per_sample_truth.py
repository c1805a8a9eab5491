"""Squared gradients by the book: one sample at a time, plain autograd, in any precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tolerance import assert_within_budget


def squared_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Iterable[str],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Σ g² over all samples of `batches`, from a copy of `model` in eval mode."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).to(dtype)  # class weights
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    total = [torch.zeros_like(parameter) for parameter in chosen]
    for inputs, targets in batches:
        for i in range(len(inputs)):
            loss = loss_fn(model(inputs[i : i + 1].to(dtype)), targets[i : i + 1])
            gradients = torch.autograd.grad(loss, chosen, allow_unused=True)
            for score, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    score += gradient**2
    return dict(zip(names, total, strict=True))


def assert_exact(
    actual: Mapping[str, Tensor],
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    factor: float = 2.0,
) -> None:
    """Fail unless `actual` is about as close to the float64 truth as a plain float32 loop.

    `factor` is how many times the loop's error is allowed.
    """
    names = list(actual)
    truth = squared_gradients(model, batches, names, loss_fn)
    plain = squared_gradients(model, batches, names, loss_fn, torch.float32)
    largest = max(float(score.norm()) for score in truth.values())
    for name in names:
        assert actual[name].shape == truth[name].shape, name
        assert actual[name].dtype == torch.float32, name
        # some gradients are zero but for rounding: k's bias has none, softmax being what it is
        if truth[name].norm() < 1e-12 * largest:
            assert actual[name].norm() < 1e-9 * largest, name
    # every parameter counts alike, however small its gradients
    scale = {name: truth[name].norm() for name in names if truth[name].norm() >= 1e-12 * largest}
    stacked = [
        torch.cat([(scores[name].double() / scale[name]).reshape(-1) for name in scale])
        for scores in (actual, plain, truth)
    ]
    assert_within_budget(stacked[0].float(), *stacked[1:], factor=factor)
