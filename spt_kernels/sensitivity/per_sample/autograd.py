"""The plain way: one sample forward, one sample backward, the gradient as autograd gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import Batch
from .losses import PerSampleLoss


def sample_gradients(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    loss_scale: float,
    input_needs_grad: bool,
) -> Iterator[dict[str, Tensor | None] | None]:
    """Yield, sample by sample, the gradient of its own loss by parameter; None where unused.

    Nothing is had of a sample whose loss is undefined or a constant: None in place of all
    gradients. See `Methods.input_needs_grad`; checkpoints that ask for that want a whole backward
    pass as well.
    """
    gradients_of = _by_backward if input_needs_grad else _by_grad
    with _requiring_grad(parameters):
        for i in range(batch.size):
            sample = batch.samples(i, i + 1)
            input = sample.input
            if input_needs_grad:
                input = pytree.tree_map(requiring_grad, input)
            outputs = loss.outputs(model, input, 1)
            own = loss.of_sample(outputs, sample.target, 1, 0)
            if loss.is_undefined(own, outputs, sample.target, 1, 0):
                yield None
                continue
            if not own.requires_grad:  # a constant, or of a sample that comes by none of them
                yield None if has_graph(outputs) else dict.fromkeys(parameters)
                continue
            gradients = gradients_of(own * loss_scale, list(parameters.values()))
            yield {
                # of a table with sparse gradients a word that comes twice may have two rows
                name: None if gradient is None else gradient.to_dense() / loss_scale
                for name, gradient in zip(parameters, gradients, strict=True)
            }


def add_squared_gradients(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    loss_scale: float,
    input_needs_grad: bool,
    scores: Mapping[str, Tensor],
    reached: set[str],
) -> int:
    """Add the squared gradient of every sample of `batch` to `scores`, which are mutated.

    The names of those that some loss depends on are added to `reached`.

    Returns:
        How many samples have a loss.
    """
    n_defined = 0
    every = sample_gradients(model, loss, batch, parameters, loss_scale, input_needs_grad)
    for gradients in every:
        n_defined += gradients is not None
        for name, gradient in (gradients or {}).items():
            if gradient is not None:
                reached.add(name)
                scores[name] += gradient.float().square_()
    return n_defined


def requiring_grad(value: Any) -> Any:
    """A floating tensor as a leaf of its own that requires a gradient; anything else as it is."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_(True) if floats else value


def has_graph(tree: Any) -> bool:
    """Whether a gradient could come to anything through one of its tensors."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(tree))


def _by_grad(loss: Tensor, parameters: list[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _by_backward(loss: Tensor, parameters: list[Tensor]) -> Sequence[Tensor | None]:
    """The same of a model whose checkpoints refuse `autograd.grad`."""
    before = [(p, p.grad, p._backward_hooks, p._post_accumulate_grad_hooks) for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter._backward_hooks = parameter._post_accumulate_grad_hooks = {}
        loss.backward()
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, grad, hooks, post_hooks in before:
            parameter.grad, parameter._backward_hooks = grad, hooks
            parameter._post_accumulate_grad_hooks = post_hooks


@contextlib.contextmanager
def _requiring_grad(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
