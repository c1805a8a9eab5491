"""The samples that count: those whose loss depends on the model, and is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import Batch, Samples, two_samples
from .losses import PerSampleLoss
from .random_state import forked_random_state

T = TypeVar("T")


def on_first_counted(
    model: nn.Module,
    loss: PerSampleLoss,
    samples: Samples,
    attempt: Callable[[Batch], T | None],
) -> T:
    """What `attempt` makes of the first batch in which some samples count.

    That batch comes again from `samples`, without those that do not. What the model draws at random
    is drawn again then; what drawing samples does, as their augmentation, is not.

    Args:
        model: frozen.
        loss: of each sample.
        samples: to draw from.
        attempt: gives None where a sample that it took does not count.

    Raises:
        ValueError: no sample counts.
    """
    passed_over, index, is_undefined = 0, 0, False
    for batch in samples:
        with forked_random_state(model.parameters()):
            made = attempt(batch)
            if made is None:
                counting, is_undefined = _counting(model, loss, batch)
        if made is None:
            samples.give_back(batch.size - len(counting))
            if not counting:
                passed_over, index = passed_over + batch.size, batch.index
                if passed_over >= samples.patience:
                    break
                continue
            batch = batch.keep(counting)
            with forked_random_state(model.parameters()):
                made = attempt(batch)
            if made is None:
                raise _independent(loss, "any parameter that is measured")
        samples.put_back(batch)
        return made
    if is_undefined:
        raise ValueError(
            f"the loss is nan in batch {index}, whatever the model's output, and so it is for each "
            f"of {passed_over} samples: expected at least one with a valid label"
        )
    raise _independent(loss, "the model (it needs no gradient)")


def _independent(loss: PerSampleLoss, what: str) -> ValueError:
    return ValueError(f"loss_fn {loss.name}: the loss does not depend on {what}")


def _counting(model: nn.Module, loss: PerSampleLoss, batch: Batch) -> tuple[list[int], bool]:
    """Numbers of the samples that count, and whether any of the others has no defined loss."""
    if not loss.parts(model, two_samples(batch).input):
        alone = (batch.samples(i, i + 1) for i in range(batch.size))
        found = [fate for sample in alone for fate in _fates(model, loss, sample)]
    else:
        found = _fates(model, loss, batch)
    counting = [sample for sample, (counts, _) in enumerate(found) if counts]
    return counting, any(is_undefined for _, is_undefined in found)


def _fates(model: nn.Module, loss: PerSampleLoss, batch: Batch) -> list[tuple[bool, bool]]:
    """Of each sample, after one forward pass: whether it counts, whether its loss is undefined."""
    with torch.no_grad():
        outputs = loss.outputs(model, batch.input, batch.size)
    outputs = pytree.tree_map(_as_leaf, outputs)
    has_leaves = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(outputs))
    found = []
    for sample in range(batch.size):
        own = loss.of_sample(outputs, batch.target, batch.size, sample)
        undefined = loss.is_undefined(own, outputs, batch.target, batch.size, sample)
        found.append((not undefined and (own.requires_grad or not has_leaves), undefined))
    return found


def _as_leaf(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_(True) if floats else value
