"""The plain way: one sample forward, one sample backward, the gradient as autograd gives it.

It is taken parameter by parameter, each as the backward pass comes to it, and is gone before the
next: the gradient of a whole model is as large as the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import Batch
from .losses import PerSampleLoss, requiring_grad
from .parameter_state import restore, states_of

Take = Callable[[str, Tensor], None]


def take_gradients(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    loss_scale: float,
    input_needs_grad: bool,
    take: Callable[[int, str, Tensor], None],
) -> list[int]:
    """Hand over, sample by sample, the gradient of its own loss for every parameter that has one.

    Args:
        model: of which `parameters` are frozen; frozen again afterwards.
        loss: of each sample.
        batch: of the samples.
        parameters: by name.
        loss_scale: factor on the loss in backward passes, of which gradients are free again.
        input_needs_grad: see `Methods`. Checkpoints that ask for that bring a parameter's gradient
            in parts, so that all of a sample are there before the first is handed over.
        take: given the number of the sample, the name, and the gradient, which is not to be written
            into: the rest of the backward pass may read the same memory.

    Returns:
        Numbers of the samples that count: the loss of the others is undefined, or a constant.
    """

    def counts(i: int) -> bool:
        sample = batch.samples(i, i + 1)
        input = pytree.tree_map(requiring_grad, sample.input) if input_needs_grad else sample.input
        outputs = loss.outputs(model, input, 1)
        own = loss.of_sample(outputs, sample.target, 1, 0)
        if loss.is_undefined(own, outputs, sample.target, 1, 0):
            return False
        if not own.requires_grad:  # a constant, or of a sample that comes by none of them
            return not has_graph(outputs)

        def take_unscaled(name: str, gradient: Tensor) -> None:
            # of a table with sparse gradients a word that comes twice may have two rows
            gradient = gradient.to_dense()
            take(i, name, gradient if loss_scale == 1 else gradient / loss_scale)

        backward = _backward_whole if input_needs_grad else _backward
        backward(own * loss_scale, parameters, take_unscaled)
        return True

    with _requiring_grad(parameters):
        return [i for i in range(batch.size) if counts(i)]


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

    def add(sample: int, name: str, gradient: Tensor) -> None:
        reached.add(name)
        scores[name] += gradient.float().square()

    return len(take_gradients(model, loss, batch, parameters, loss_scale, input_needs_grad, add))


def has_graph(tree: Any) -> bool:
    """Whether a gradient could come to anything through one of its tensors."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(tree))


def _backward(loss: Tensor, parameters: Mapping[str, Tensor], take: Take) -> None:
    """Hand over each gradient when it is complete, in the midst of the backward pass."""
    taken: set[str] = set()

    def hand_over(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if name in taken:
            raise RuntimeError(
                f"the gradient of {name} comes in parts, as from a backward pass within another "
                "one: leave the parameter out with exclude"
            )
        taken.add(name)
        take(name, gradient)

    with _only_hooks(parameters, hand_over):
        torch.autograd.backward(loss, inputs=list(parameters.values()))


def _backward_whole(loss: Tensor, parameters: Mapping[str, Tensor], take: Take) -> None:
    """The same of a model whose checkpoints run backward passes within the backward pass."""
    with _only_hooks(parameters, None):
        loss.backward()
        for name, parameter in parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                take(name, gradient)


@contextlib.contextmanager
def _only_hooks(
    parameters: Mapping[str, Tensor], hook: Callable[[str, Tensor], None] | None
) -> Iterator[None]:
    """Without `.grad` and hooks, such as those of an optimizer in the backward, but for `hook`.

    Args:
        parameters: by name; they have their own again afterwards.
        hook: given the name and a parameter whose gradient has been accumulated.
    """
    before = states_of(parameters.values())
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter._backward_hooks = {}
            parameter._post_accumulate_grad_hooks = {0: partial(hook, name)} if hook else {}
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def _requiring_grad(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
