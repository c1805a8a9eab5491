"""Each sample's own loss, from a loss function made for batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

LossFunction = Callable[[Any, Any], Tensor]

# what a loss function raises when outputs and target do not fit it
_MISFITS = (IndexError, TypeError, ValueError, RuntimeError)


def samples_of(tree: Any, batch: int, start: int, stop: int) -> Any:
    """The samples `start:stop` of every tensor in `tree` that has one row per sample."""

    def cut(value: Any) -> Any:
        is_batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value[start:stop] if is_batched else value

    return pytree.tree_map(cut, tree)


class PerSampleLoss:
    """Sums `loss_fn` over samples, calling it on one sample at a time.

    So any reduction, class weights, label smoothing or mixing inside `loss_fn` means what it means
    for a batch of one. Plain cross-entropy is computed in one call.
    """

    def __init__(self, loss_fn: LossFunction) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
        self._loss_fn = loss_fn
        self._name = getattr(loss_fn, "__name__", type(loss_fn).__name__)

    def total(self, outputs: Any, target: Any, batch: int) -> Tensor:
        """Sum of the losses of all samples, a scalar."""
        self._check_labels(outputs, target)
        if self._is_plain_cross_entropy(outputs, target):
            return F.cross_entropy(outputs, target, reduction="sum")
        one_by_one = zip(_rows(outputs, batch), _rows(target, batch), strict=True)
        return torch.stack([self._call(output, label) for output, label in one_by_one]).sum()

    def of_sample(self, outputs: Any, target: Any, batch: int, sample: int) -> Tensor:
        """The loss of one sample, a scalar."""
        self._check_labels(outputs, target)
        stop = sample + 1
        return self._call(
            samples_of(outputs, batch, sample, stop), samples_of(target, batch, sample, stop)
        )

    def _is_plain_cross_entropy(self, outputs: Any, target: Any) -> bool:
        # with more dimensions its mean is over the positions of a sample as well
        is_plain = self._loss_fn is F.cross_entropy
        return is_plain and isinstance(outputs, Tensor) and outputs.ndim == 2

    def _call(self, output: Any, target: Any) -> Tensor:
        try:
            loss = self._loss_fn(output, target)
        except torch.OutOfMemoryError:
            raise
        except _MISFITS as error:
            raise ValueError(
                f"loss_fn {self._name} failed on a model output of {_summary(output)} and a target "
                f"of {_summary(target)}: {error}"
            ) from error
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn {self._name}: expected a tensor, got {type(loss).__name__}")
        if loss.ndim:
            raise ValueError(
                f"loss_fn {self._name}: expected a scalar, got shape {tuple(loss.shape)}"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"loss_fn {self._name}: the loss does not depend on the model (it needs no "
                "gradient)"
            )
        return loss

    def _check_labels(self, outputs: Any, target: Any) -> None:
        """Name the target when labels do not fit a classification loss; a GPU only aborts."""
        is_module = isinstance(self._loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss))
        if not is_module and self._loss_fn not in (F.cross_entropy, F.nll_loss):
            return
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise ValueError(
                f"loss_fn {self._name}: expected a model output of [samples, classes], got "
                f"{_summary(outputs)}"
            )
        if not isinstance(target, Tensor):
            raise TypeError(f"target: expected a tensor of labels, got {type(target).__name__}")
        if target.is_floating_point() and target.shape == outputs.shape:
            return  # probabilities
        if target.dtype not in (torch.int64, torch.uint8):
            raise TypeError(f"target: expected labels of dtype int64, got {target.dtype}")
        expected = (outputs.shape[0], *outputs.shape[2:])
        if tuple(target.shape) != expected:
            raise ValueError(f"target: expected shape {expected}, got {tuple(target.shape)}")
        n_classes = outputs.shape[1]
        low, high = (int(value) for value in target.aminmax())
        ignored = getattr(self._loss_fn, "ignore_index", -100)
        is_ignored = outputs.ndim > 2 and low == ignored  # positions without a label
        if (low < 0 and not is_ignored) or high >= n_classes:
            raise ValueError(
                f"target: expected labels from 0 to {n_classes - 1}, as the model has {n_classes} "
                f"classes, got {low if low < 0 else high}"
            )


def _rows(tree: Any, batch: int) -> list[Any]:
    """One tree per sample, each tensor with a leading dimension of one."""
    leaves, spec = pytree.tree_flatten(tree)
    columns: list[Any] = []
    for leaf in leaves:
        is_batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        # one split has one node in the backward pass, where a slice per sample has one each
        columns.append(leaf.split(1) if is_batched else [leaf] * batch)
    return [spec.unflatten([column[i] for column in columns]) for i in range(batch)]


def _summary(tree: Any) -> str:
    parts = [
        f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in pytree.tree_leaves(tree)
    ]
    return ", ".join(parts) or "nothing"
