"""The loss that a model computes itself, of labels inside of the batch, for each sample alone."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...model.call import loss_in
from .losses import LossFunction, PerSampleLoss, copy_of, samples_of

# functions of `(input, target)` that reduce over rows of a batch, or over tokens of it
_LOSSES = frozenset(
    {F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss}
    | {F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div}
)
# of those the ones whose `weight` is of classes, and not of rows
_WITH_CLASS_WEIGHTS = frozenset({F.cross_entropy, F.nll_loss})

_logger = logging.getLogger("spt_kernels")


def loss_of_batches(
    loss_fn: LossFunction | None, batches: Iterable[Any]
) -> tuple[PerSampleLoss, Iterable[Any]]:
    """The loss of each sample, and the batches as pairs of (input, target).

    Of a batch that is a mapping, as transformers has it, `labels` are the target of `loss_fn`.
    Without that the model is given them too, and computes its own loss.

    Args:
        loss_fn: of the model's output and a target; None for the model's own loss of mappings, and
            cross-entropy of pairs.
        batches: the first one is drawn.
    """
    of_pairs = PerSampleLoss(F.cross_entropy if loss_fn is None else loss_fn)
    try:
        items = iter(batches)
    except TypeError:
        return of_pairs, batches  # for `Samples` to refuse
    first = next(items, None)
    every = items if first is None else chain([first], items)
    if not isinstance(first, Mapping):
        return of_pairs, every
    if loss_fn is None:
        return OwnLoss(), _with_labels_inside(every)
    return of_pairs, _with_labels_apart(every)


def _with_labels_inside(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for index, batch in enumerate(batches):
        yield dict(_mapping(batch, index)), None


def _with_labels_apart(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for index, batch in enumerate(batches):
        input = dict(_mapping(batch, index))
        if "labels" not in input:
            raise ValueError(
                f"batches: expected 'labels' in batch {index} for loss_fn, got {sorted(input)}"
            )
        target = input.pop("labels")
        yield input, target


def _mapping(batch: Any, index: int) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batches: expected a mapping as the first batch is one, got {type(batch).__name__} as "
            f"batch {index}"
        )
    return batch


class OwnLoss(PerSampleLoss):
    """The loss in a model's output, and its share of each sample.

    A mean over the tokens of a batch is no mean of the samples' own means: a long sample weighs
    more. So the one call that made the loss is looked for (of `F.cross_entropy`, say, in whatever
    code) and made again on the rows of each sample. Where the loss is more than such a call, or one
    sample's share of it is not the loss that the model gives that sample alone, the samples do not
    part, and each needs a forward of its own.
    """

    def __init__(self) -> None:
        super().__init__(lambda made, target: made.loss())
        self._name = "of the model itself"
        self._parts: bool | None = None

    def outputs(self, model: nn.Module, input: Any, batch: int) -> Any:
        """What the loss is made of, with one row for each sample."""
        recorder = _Recorder()
        with recorder:
            output = model(**copy_of(input))
        loss = loss_in(output)
        rows = recorder.rows_of(loss, batch)
        if rows is None and batch == 1:
            return _Whole(loss, output)
        if rows is None:
            raise RuntimeError(
                "the model's own loss of this batch is made in another way than that of the first "
                "one: give a loss_fn"
            )
        return rows

    def parts(self, model: nn.Module, pair: Any) -> bool:
        """Whether each sample's own loss is had from the forward of a batch; told by the first two.

        Args:
            model: in any mode.
            pair: the input of two samples.
        """
        if self._parts is None:
            modes = [(module, module.training) for module in model.modules()]
            try:
                model.eval()  # dropout would make a difference of its own
                self._parts = self._do_part(model, pair)
                if not self._parts:
                    _logger.warning(
                        "the model's own loss of a batch does not part into its samples: each "
                        "takes a forward of its own, which a loss_fn may spare"
                    )
            finally:
                for module, mode in modes:
                    module.training = mode
        return self._parts

    def learn(self, model: nn.Module, pair: Any, outputs: Any = None) -> None:
        """Nothing: what the loss is made of has a row for each sample."""

    @torch.no_grad()
    def _do_part(self, model: nn.Module, pair: Any) -> bool:
        tolerance = _tolerance(model)
        recorder = _Recorder()
        with recorder:
            loss = loss_in(model(**copy_of(pair)))
        rows = recorder.rows_of(loss, 2)
        if rows is None:
            return False
        for sample in range(2):
            alone = loss_in(model(**copy_of(samples_of(pair, 2, sample, sample + 1))))
            own = samples_of(rows, 2, sample, sample + 1).loss()
            if not torch.allclose(own, alone, rtol=tolerance, atol=0.0, equal_nan=True):
                return False
        return True


class _Rows(NamedTuple):
    """A call of a loss function, `input` and `target` as `[samples, rows of each, ...]`."""

    input: Tensor
    target: Tensor
    function: Callable[[Tensor, Tensor], Tensor]

    def loss(self) -> Tensor:
        return self.function(self.input.flatten(0, 1), self.target.flatten(0, 1))


class _Whole(NamedTuple):
    """The loss of one sample, and what the model gave besides."""

    value: Tensor
    output: Any

    def loss(self) -> Tensor:
        return self.value


class _Recorder(TorchFunctionMode):
    """Remembers the calls of loss functions."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Tensor, int, Any, Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _LOSSES:
            self._calls.append((result, result._version, func, args, kwargs))
        return result

    def rows_of(self, loss: Tensor, batch: int) -> _Rows | None:
        """The call that made this very loss, by sample; None where there is none, or no rows."""
        for result, version, func, args, kwargs in self._calls:
            if result is loss and loss._version == version:  # nothing was added to it in place
                return _rows_of_call(func, args, kwargs, batch)
        return None


def _rows_of_call(func: Any, args: Any, kwargs: Any, batch: int) -> _Rows | None:
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    input, target = given.pop("input"), given.pop("target")
    if given.get("weight") is not None and func not in _WITH_CLASS_WEIGHTS:
        return None
    if not input.ndim or not target.ndim or len(input) != len(target) or len(input) % batch:
        return None
    by_sample = (batch, len(input) // batch)
    return _Rows(
        input.unflatten(0, by_sample),
        target.unflatten(0, by_sample),
        lambda input, target: func(input, target, **given),
    )


def _tolerance(model: nn.Module) -> float:
    """Largest relative difference that rounding makes between a loss in a batch and one alone."""
    parameters = list(model.parameters())
    kinds = {parameter.device.type for parameter in parameters}
    is_coarse = any(p.is_floating_point() and p.element_size() < 4 for p in parameters)
    return 2e-2 if is_coarse or any(map(torch.is_autocast_enabled, kinds)) else 1e-4
