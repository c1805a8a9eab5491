"""Each sample's own loss, from a loss function made for batches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ...model.call import call

LossFunction = Callable[[Any, Any], Tensor]

# what a loss function raises when outputs and target do not fit it
_MISFITS = (IndexError, TypeError, ValueError, RuntimeError)


def samples_of(tree: Any, batch: int, start: int, stop: int, shared: Collection[int] = ()) -> Any:
    """The samples `start:stop` of every tensor in `tree` that has one row per sample.

    Those at the places `shared` among its leaves have none, however many rows they have.
    """
    leaves, spec = pytree.tree_flatten(tree)
    are_batched = (place not in shared and has_rows(x, batch) for place, x in enumerate(leaves))
    cut = [x[start:stop] if own else x for x, own in zip(leaves, are_batched, strict=True)]
    return spec.unflatten(cut)


def has_rows(value: Any, n: int) -> bool:
    """Whether it is a tensor of so many rows."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == n


def copy_of(tree: Any) -> Any:
    """Tensors that a model or a loss may edit in place; what comes later gets the same numbers."""
    if isinstance(tree, Tensor):
        return tree.clone()
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def requiring_grad(value: Any) -> Any:
    """A floating tensor as a leaf of its own that requires a gradient; anything else as it is."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_(True) if floats else value


class _Layout(NamedTuple):
    """Of a model's outputs: how they are nested, and which leaves have no row for each sample."""

    spec: pytree.TreeSpec
    shared: frozenset[int]


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
        self._layout: _Layout | None = None

    @property
    def name(self) -> str:
        """What the loss function goes by, for messages."""
        return self._name

    def outputs(self, model: nn.Module, input: Any, batch: int) -> Any:
        """What the loss reads of a forward pass over so many samples, with one row for each."""
        return call(model, copy_of(input))

    def parts(self, model: nn.Module, pair: Any) -> bool:
        """Whether each sample's loss is had from a forward pass over several."""
        return True

    def learn(self, model: nn.Module, pair: Any, outputs: Any = None) -> None:
        """See which outputs have a row for each sample, and which all share, as a table of classes.

        Args:
            model: in the mode in which it is measured.
            pair: the input of two samples.
            outputs: of these, where they are at hand.
        """
        if self._layout is not None:
            return
        pair = pytree.tree_map(requiring_grad, pair)  # or a reentrant checkpoint warns
        of_two = self.outputs(model, pair, 2) if outputs is None else outputs
        leaves, spec = pytree.tree_flatten(of_two)
        are_of_samples = [has_rows(leaf, 2) for leaf in leaves]
        if sum(are_of_samples) > 1:  # is one of them a table of two rows?
            first = samples_of(pair, 2, 0, 1)
            three = pytree.tree_map(
                lambda x, y: torch.cat([x, y]) if isinstance(x, Tensor) else x, pair, first
            )
            leaves, spec_of_three = pytree.tree_flatten(self.outputs(model, three, 3))
            if spec_of_three == spec:
                are_of_samples = [has_rows(leaf, 3) for leaf in leaves]
        shared = frozenset(place for place, own in enumerate(are_of_samples) if not own)
        self._layout = _Layout(spec, shared)

    def _shared_in(self, outputs: Any) -> frozenset[int]:
        """Places of the outputs that all samples share, as far as that was learnt."""
        if self._layout is None or self._layout.spec != pytree.tree_structure(outputs):
            return frozenset()
        return self._layout.shared

    def _pair_of(self, outputs: Any, target: Any, batch: int, sample: int) -> tuple[Any, Any]:
        stop, shared = sample + 1, self._shared_in(outputs)
        output = samples_of(outputs, batch, sample, stop, shared)
        return output, samples_of(target, batch, sample, stop)

    def _pairs(self, outputs: Any, target: Any, batch: int) -> list[tuple[Any, Any]]:
        rows = _rows(outputs, batch, self._shared_in(outputs))
        return list(zip(rows, _rows(target, batch), strict=True))

    def labelled(self, target: Any, batch: int) -> list[int] | None:
        """Which samples have a label at all; None for all, and where it is not known before a loss.

        A target of `ignore_index` everywhere has none: its own mean would be 0 / 0. One on a card
        is looked at with its loss, as the host would wait for the card here.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]
        if not all(tensor.is_cpu for tensor in tensors):
            return None
        return self._with_labels(target, batch)

    def total(self, outputs: Any, target: Any, batch: int) -> tuple[Tensor, int]:
        """Sum of the losses of all samples, a scalar, and how many of them count.

        One whose loss needs no gradient counts as none, as many loss functions give a constant for
        a sample without labels.
        """
        may_lack = self._check_labels(outputs, target)
        with_labels = self._with_labels(target, batch) if may_lack else None
        if self._is_plain_cross_entropy(outputs):
            counted = batch if with_labels is None else len(with_labels)
            return F.cross_entropy(outputs, target, reduction="sum"), counted
        pairs = self._pairs(outputs, target, batch)
        if with_labels is not None:
            pairs = [pairs[sample] for sample in with_labels]
        losses = [self._call(*pair) for pair in pairs]
        return _summed([loss for loss in losses if loss.requires_grad], target)

    def total_of_defined(self, outputs: Any, target: Any, batch: int) -> tuple[Tensor, int]:
        """`total` without the samples whose loss is undefined; slower."""
        losses = [self._call(*pair) for pair in self._pairs(outputs, target, batch)]
        counting = [
            loss
            for sample, loss in enumerate(losses)
            if self.counts(loss, outputs, target, batch, sample)
        ]
        return _summed(counting, target)

    def of_sample(self, outputs: Any, target: Any, batch: int, sample: int) -> Tensor:
        """The loss of one sample, a scalar."""
        self._check_labels(outputs, target)
        return self._call(*self._pair_of(outputs, target, batch, sample))

    def of_each(self, outputs: Any, target: Any, batch: int) -> list[Tensor] | None:
        """The losses of a small batch; None where one of them does not count."""
        losses = [self.of_sample(outputs, target, batch, sample) for sample in range(batch)]
        are_counting = (self.counts(own, outputs, target, batch, i) for i, own in enumerate(losses))
        return losses if all(are_counting) else None

    def counts(self, loss: Tensor, outputs: Any, target: Any, batch: int, sample: int) -> bool:
        """Whether the loss of one sample depends on the outputs, and is defined for its target."""
        is_undefined = self.is_undefined(loss, outputs, target, batch, sample)
        return loss.requires_grad and not is_undefined

    def is_undefined(
        self, loss: Tensor, outputs: Any, target: Any, batch: int, sample: int
    ) -> bool:
        """Whether there is no label, or the loss is NaN whatever the outputs are, as a mean is."""
        output, label = self._pair_of(outputs, target, batch, sample)
        if self._with_labels(label, 1) == []:
            return True
        if not bool(loss.isnan()):
            return False
        tensors = [t for t in pytree.tree_leaves(label) if isinstance(t, Tensor)]
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors):
            return False  # an error in the data
        zeros = pytree.tree_map(_zeros_like, output)
        with torch.no_grad():
            return bool(self._call(zeros, label).isnan())

    def _is_plain_cross_entropy(self, outputs: Any) -> bool:
        # with more dimensions its mean is over the positions of a sample as well
        is_plain = self._loss_fn is F.cross_entropy
        return is_plain and isinstance(outputs, Tensor) and outputs.ndim == 2

    def _call(self, output: Any, target: Any) -> Tensor:
        try:
            loss = self._loss_fn(output, copy_of(target))
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
        return loss

    def _with_labels(self, target: Any, batch: int) -> list[int] | None:
        """Which samples have a label at all; None for all, and where only the loss can tell."""
        if not self._is_classification() or not isinstance(target, Tensor):
            return None
        if target.is_floating_point() or target.ndim == 0 or len(target) != batch:
            return None
        has_label = (target != self._ignored()).reshape(batch, -1).any(1)
        return None if bool(has_label.all()) else has_label.nonzero().flatten().tolist()

    def _is_classification(self) -> bool:
        is_module = isinstance(self._loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss))
        return is_module or self._loss_fn in (F.cross_entropy, F.nll_loss)

    def _ignored(self) -> int:
        """The label that means none."""
        return int(getattr(self._loss_fn, "ignore_index", -100))

    def _check_labels(self, outputs: Any, target: Any) -> bool:
        """Name the target when labels do not fit a classification loss; a GPU only aborts.

        Returns:
            Whether some of them may be missing.
        """
        if not self._is_classification():
            return False
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise ValueError(
                f"loss_fn {self._name}: expected a model output of [samples, classes], got "
                f"{_summary(outputs)}"
            )
        if not isinstance(target, Tensor):
            raise TypeError(f"target: expected a tensor of labels, got {type(target).__name__}")
        if target.is_floating_point() and target.shape == outputs.shape:
            return False  # probabilities
        if target.dtype not in (torch.int64, torch.uint8):
            raise TypeError(f"target: expected labels of dtype int64, got {target.dtype}")
        expected = (outputs.shape[0], *outputs.shape[2:])
        if tuple(target.shape) != expected:
            raise ValueError(f"target: expected shape {expected}, got {tuple(target.shape)}")
        n_classes = outputs.shape[1]
        low, high = _range(target)
        may_lack = low <= self._ignored() <= high
        if low < 0 or high >= n_classes:
            # only where need be, as it takes a copy
            low, high = _range(target[target != self._ignored()])
        if low < 0 or high >= n_classes:
            raise ValueError(
                f"target: expected labels from 0 to {n_classes - 1}, as the model has {n_classes} "
                f"classes, or {self._ignored()} for none (ignore_index), got "
                f"{low if low < 0 else high}"
            )
        return may_lack


def _range(labels: Tensor) -> tuple[int, int]:
    if not labels.numel():
        return 0, 0
    low, high = labels.aminmax()
    return int(low), int(high)


def _summed(counted: list[Tensor], target: Any) -> tuple[Tensor, int]:
    if not counted:
        tensors = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]
        return torch.zeros((), device=tensors[0].device if tensors else None), 0
    return torch.stack(counted).sum(), len(counted)


def _zeros_like(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return torch.zeros_like(value) if floats else value


def _rows(tree: Any, batch: int, shared: Collection[int] = ()) -> list[Any]:
    """One tree per sample, each tensor with a leading dimension of one; see `samples_of`."""
    leaves, spec = pytree.tree_flatten(tree)
    columns: list[Any] = []
    for place, leaf in enumerate(leaves):
        is_batched = place not in shared and has_rows(leaf, batch)
        # one split has one node in the backward pass, where a slice per sample has one each
        columns.append(leaf.split(1) if is_batched else [leaf] * batch)
    return [spec.unflatten([column[i] for column in columns]) for i in range(batch)]


def _summary(tree: Any) -> str:
    parts = [
        f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in pytree.tree_leaves(tree)
    ]
    return ", ".join(parts) or "nothing"
