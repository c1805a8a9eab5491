"""The measurement itself: batches in, squared gradients of each sample's own loss out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...model.head import in_few_words, parts_of
from ...ops.dtypes import FLOATS_OF_16_BITS
from .accumulator import Accumulator
from .autograd import add_squared_gradients
from .batches import Batch, Samples
from .counted import on_first_counted
from .interception import Interception
from .losses import PerSampleLoss, requiring_grad
from .methods import Methods
from .observation import Arrival
from .probe import expand, probe

_FP16_LOSS_SCALE = 1024.0  # keeps small gradients in fp16's range, as a GradScaler would

logger = logging.getLogger("spt_kernels")


def measure(
    model: nn.Module,
    loss: PerSampleLoss,
    samples: Samples,
    names: list[str],
    tokens: tuple[str, ...],
    layers: Iterable[nn.Module],
    report: Callable[[int], None],
) -> tuple[dict[str, Tensor], int, Methods]:
    """Sum the squared gradients of every sample.

    Args:
        model: frozen, in the mode in which to measure.
        loss: of each sample.
        samples: those to measure on.
        names: the parameters to measure.
        tokens: those of `names` that all samples share as `[1, ...]`.
        layers: those of which to tell whether the model calls them.
        report: called after each batch with the number of samples so far.

    Returns:
        Scores in fp32 by name, the number of samples, and how each parameter was measured.
    """
    measurement = _Measurement(model, loss, samples, names, tokens, layers)
    done = 0
    for batch in samples:
        counted = measurement.add(batch)
        samples.give_back(batch.size - counted)
        done += counted
        report(done)
    return measurement.finish(), done, measurement.methods


class _Measurement:
    """Scores in the making: the first samples tell how each parameter is measured, all add to it.

    Args:
        model: as of `measure`, as are the others.
        loss: of each sample.
        samples: of which the first that count are looked at, and come again.
        names: of the parameters.
        tokens: those that all samples share.
        layers: those of which to tell whether the model calls them.

    Attributes:
        methods: how each parameter is measured, as far as the samples up to now tell.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        samples: Samples,
        names: list[str],
        tokens: tuple[str, ...],
        layers: Iterable[nn.Module],
    ) -> None:
        every = dict(model.named_parameters())
        self._model, self._loss = model, loss
        self._parameters = parameters = {name: every[name] for name in names}
        dtypes = _compute_dtypes(parameters)
        self._loss_scale = scale = _FP16_LOSS_SCALE if torch.float16 in dtypes else 1.0
        tolerance = 0.1 if dtypes & set(FLOATS_OF_16_BITS) else 1e-3
        self._interception = Interception(parameters, [*model.parameters(), *model.buffers()])

        def attempt(batch: Batch) -> Methods | None:
            how = parameters, self._interception, tokens, layers, scale, tolerance
            return probe(model, loss, batch, *how)

        self.methods = on_first_counted(model, loss, samples, attempt)
        self._tell()
        # not before: the probe has what the scores take to itself
        self._scores = {name: _zeros_like(parameter) for name, parameter in parameters.items()}
        self._accumulator = Accumulator(self._scores, self.methods.n_uses, 1 / scale)
        self._sleepers = _Sleepers(self.methods.asleep, self._accumulator)
        self._reached: set[str] = set()  # of those measured one by one

    def add(self, batch: Batch) -> int:
        """Add the squares of a batch; how many of its samples count."""
        counted: int | None = None
        if self.methods.n_uses or self.methods.expanded:
            counted = self._add_together(batch)
        if self.methods.one_by_one:
            alone = self._add_one_by_one(batch)
            counted = alone if counted is None else counted
        assert counted is not None
        return counted

    def finish(self) -> dict[str, Tensor]:
        """The scores, when there are no more samples."""
        late = set(self.methods.one_by_one) - self._reached
        if late:  # as nobody could tell before the last sample
            self.methods = self.methods.with_idle(late)
            logger.warning(_idle_line(self.methods, self._parameters))
        self._accumulator.finish()
        check_finite(self._scores)
        return self._scores

    def _add_together(self, batch: Batch) -> int:
        """One pass over all samples, of what is observed and of what all of them share."""
        methods, sleepers = self.methods, self._sleepers
        leaves = expand({name: self._parameters[name] for name in methods.expanded}, batch.size)
        # as in the probe: what asks for a gradient is no constant, but a sample's own
        needs_grad = methods.input_needs_grad or bool(methods.derived)
        with self._interception.watching(
            [*methods.n_uses, *sleepers.names],
            batch.size,
            sleepers.receive,
            derived=methods.derived,
            replaced=leaves,
        ):
            counted = _run(self._model, self._loss, batch, needs_grad, self._loss_scale)
        unrecognized = self._interception.unrecognized
        woken = sleepers.woken(unrecognized)
        _check_uses(unrecognized)
        self._accumulator.finish_batch()
        if woken:  # plain autograd takes over, from this batch on
            self.methods = methods.with_woken(woken)
            self._tell()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                squares = (leaf.grad.float() / self._loss_scale).square_()
                self._scores[name] += squares.sum(0, keepdim=True)
        return counted

    def _add_one_by_one(self, batch: Batch) -> int:
        """A pass for each sample, of what plain autograd alone tells."""
        return add_squared_gradients(
            self._model,
            self._loss,
            batch,
            {name: self._parameters[name] for name in self.methods.one_by_one},
            self._loss_scale,
            self.methods.input_needs_grad,
            self._scores,
            self._reached,
        )

    def _tell(self) -> None:
        """One line on the parameters that are measured slowly, or not reached at all."""
        one_by_one, names, lines = self.methods.one_by_one, self._parameters, []
        if one_by_one:
            lines.append(
                f"{len(one_by_one)} of {len(names)} parameters are measured sample by sample, "
                f"which is exact but slow: {in_few_words(one_by_one)}"
            )
        if self.methods.idle:
            lines.append(_idle_line(self.methods, names))
        if lines:
            logger.warning("; ".join(lines))


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)


class _Sleepers:
    """Parameters that the first samples' losses did not depend on, watched for later uses.

    Attributes:
        names: those that no later loss has depended on either.
        receive: takes the arrivals of a backward pass, and hands them on.
    """

    def __init__(self, names: Iterable[str], accumulator: Accumulator) -> None:
        self.names = set(names)
        self._reached: set[str] = set()
        self._accumulator = accumulator
        self.receive = self._notice if self.names else accumulator.receive

    def woken(self, unrecognized: set[str]) -> list[str]:
        """Those used by now, in sight or not, which are watched no longer."""
        woken = self.names & (self._reached | unrecognized)
        self.names -= woken
        unrecognized -= woken
        return sorted(woken)

    def _notice(self, arrival: Arrival) -> None:
        self._reached.update(piece.name for piece, _ in arrival.parts)
        self._accumulator.receive(arrival)


def _run(
    model: nn.Module, loss: PerSampleLoss, batch: Batch, input_needs_grad: bool, loss_scale: float
) -> int:
    """One forward and one backward pass over the batch; how many of its samples count."""
    input = pytree.tree_map(requiring_grad, batch.input) if input_needs_grad else batch.input
    outputs = loss.outputs(model, input, batch.size)
    total, counted = loss.total(outputs, batch.target, batch.size)
    if not torch.isfinite(total):
        total, counted = loss.total_of_defined(outputs, batch.target, batch.size)
        if not torch.isfinite(total):
            raise ValueError(f"the loss is {total.item()} in batch {batch.index}")
    if total.requires_grad:
        (total * loss_scale).backward()
    return counted


def _check_uses(unrecognized: set[str]) -> None:
    if unrecognized:
        names = ", ".join(sorted(unrecognized)[:4])
        raise RuntimeError(
            f"this batch uses {names} in a way that the first one did not: a model whose uses vary "
            "cannot be measured in batches; leave the parameter out with exclude"
        )


def _compute_dtypes(parameters: Mapping[str, Tensor]) -> set[torch.dtype]:
    """Dtypes in which the model may compute, autocast included."""
    dtypes = {parameter.dtype for parameter in parameters.values()}
    for kind in {parameter.device.type for parameter in parameters.values()}:
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    return dtypes


def _idle_line(methods: Methods, names: Collection[str]) -> str:
    return (
        f"the loss does not depend on {len(methods.idle)} of {len(names)} parameters, which "
        f"score 0: {in_few_words(parts_of(methods.idle, names))}"
    )


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise for a score that is no number, or too large for one."""
    for name, score in scores.items():
        # one read pass: a score is not negative, and a NaN is larger than any number here
        if score.numel() and not torch.isfinite(score.amax()):
            raise ValueError(
                f"the sensitivity of {name} is not finite: its gradients are, or overflow"
            )
