"""The measurement itself: batches in, squared gradients of each sample's own loss out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...model.head import in_few_words, parts_of
from .accumulator import Accumulator
from .autograd import add_squared_gradients
from .batches import Batch, Samples
from .counted import on_first_counted
from .interception import Arrival, Interception
from .losses import PerSampleLoss, requiring_grad
from .methods import Methods
from .probe import expand, probe

_FP16_LOSS_SCALE = 1024.0  # keeps small gradients in fp16's range, as a GradScaler would
_LOW_PRECISION = (torch.float16, torch.bfloat16)

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
    all_parameters = dict(model.named_parameters())
    parameters = {name: all_parameters[name] for name in names}
    scores: dict[str, Tensor] = {}
    dtypes = _compute_dtypes(parameters)
    loss_scale = _FP16_LOSS_SCALE if torch.float16 in dtypes else 1.0
    tolerance = 0.1 if dtypes & set(_LOW_PRECISION) else 1e-3
    interception = Interception(parameters, [*model.parameters(), *model.buffers()])
    methods: Methods | None = None
    done = 0
    reached: set[str] = set()
    for batch in samples:
        if methods is None:
            samples.put_back(batch)
            with forked_random_state(parameters.values()):
                methods = on_first_counted(
                    model,
                    loss,
                    samples,
                    lambda batch: probe(
                        model,
                        loss,
                        batch,
                        parameters,
                        interception,
                        tokens,
                        layers,
                        loss_scale,
                        tolerance,
                    ),
                )
            batch = next(samples)
            _tell(methods, parameters)
            # from here on: the probe has what the scores take to itself
            scores |= {name: _zeros_like(parameter) for name, parameter in parameters.items()}
            accumulator = Accumulator(scores, methods.n_uses, 1 / loss_scale)
            one_by_one = {name: parameters[name] for name in methods.one_by_one}
            sleepers = _Sleepers(methods.asleep, accumulator)
        counted: int | None = None
        if methods.n_uses or methods.expanded:
            leaves = expand({name: parameters[name] for name in methods.expanded}, batch.size)
            watched = [*methods.n_uses, *sleepers.names]
            # as in the probe: what asks for a gradient is no constant, but a sample's own
            needs_grad = methods.input_needs_grad or bool(methods.derived)
            with interception.watching(
                watched, batch.size, sleepers.receive, derived=methods.derived, replaced=leaves
            ):
                counted = _run(model, loss, batch, needs_grad, loss_scale)
            woken = sleepers.woken(interception.unrecognized)
            _check_uses(interception.unrecognized)
            accumulator.finish_batch()
            if woken:
                # plain autograd takes over, from this batch on
                one_by_one |= {name: parameters[name] for name in woken}
                methods = methods.with_woken(woken)
                _tell(methods, parameters)
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    squares = (leaf.grad.float() / loss_scale).square_()
                    scores[name] += squares.sum(0, keepdim=True)
        if one_by_one:
            alone = add_squared_gradients(
                model,
                loss,
                batch,
                one_by_one,
                loss_scale,
                methods.input_needs_grad,
                scores,
                reached,
            )
            counted = alone if counted is None else counted
        assert counted is not None
        samples.give_back(batch.size - counted)
        done += counted
        report(done)
    assert methods is not None
    late = set(methods.one_by_one) - reached
    if late:  # as nobody could tell before the last sample
        methods = methods.with_idle(late)
        logger.warning(_idle_line(methods, parameters))
    accumulator.finish()
    check_finite(scores)
    return scores, done, methods


@contextlib.contextmanager
def forked_random_state(parameters: Iterable[Tensor]) -> Iterator[None]:
    """What is drawn in a `with` block is drawn again after it."""
    devices = sorted({p.device for p in parameters if p.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices):
        yield


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


def _tell(methods: Methods, names: Collection[str]) -> None:
    """One line on the parameters that are measured slowly, or not reached at all."""
    lines = []
    if methods.one_by_one:
        lines.append(
            f"{len(methods.one_by_one)} of {len(names)} parameters are measured sample by sample, "
            f"which is exact but slow: {in_few_words(methods.one_by_one)}"
        )
    if methods.idle:
        lines.append(_idle_line(methods, names))
    if lines:
        logger.warning("; ".join(lines))


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
