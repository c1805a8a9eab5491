"""The measurement itself: batches in, squared gradients of each sample's own loss out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .accumulator import Accumulator
from .autograd import add_squared_gradients
from .batches import Batch
from .interception import Interception
from .losses import PerSampleLoss
from .probe import Methods, expand, probe

_FP16_LOSS_SCALE = 1024.0  # keeps small gradients in fp16's range, as a GradScaler would
_LOW_PRECISION = (torch.float16, torch.bfloat16)

logger = logging.getLogger("spt_kernels")


def measure(
    model: nn.Module,
    loss: PerSampleLoss,
    batches: Iterator[Batch],
    names: list[str],
    tokens: tuple[str, ...],
    layers: Iterable[nn.Module],
    report: Callable[[int], None],
) -> tuple[dict[str, Tensor], int, Methods]:
    """Sum the squared gradients of every sample.

    Args:
        model: frozen, in the mode in which to measure.
        loss: of each sample.
        batches: at least one.
        names: the parameters to measure.
        tokens: those of `names` that all samples share as `[1, ...]`.
        layers: those of which to tell whether the model calls them.
        report: called after each batch with the number of samples so far.

    Returns:
        Scores in fp32 by name, the number of samples, and how each parameter was measured.
    """
    all_parameters = dict(model.named_parameters())
    parameters = {name: all_parameters[name] for name in names}
    scores = {
        name: torch.zeros_like(
            parameter, dtype=torch.float32, memory_format=torch.contiguous_format
        )
        for name, parameter in parameters.items()
    }
    dtypes = _compute_dtypes(parameters)
    loss_scale = _FP16_LOSS_SCALE if torch.float16 in dtypes else 1.0
    tolerance = 0.1 if dtypes & set(_LOW_PRECISION) else 1e-3
    interception = Interception(parameters)
    methods: Methods | None = None
    done = 0
    for batch in batches:
        if methods is None:
            devices = sorted({p.device for p in parameters.values() if p.is_cuda}, key=str)
            with torch.random.fork_rng(devices=devices):
                methods = probe(
                    model,
                    loss,
                    batch,
                    parameters,
                    interception,
                    tokens,
                    layers,
                    loss_scale,
                    tolerance,
                )
            _tell(methods, len(parameters))
            accumulator = Accumulator(scores, methods.n_uses, 1 / loss_scale)
            one_by_one = {name: parameters[name] for name in methods.one_by_one}
        if methods.n_uses or methods.expanded:
            leaves = expand({name: parameters[name] for name in methods.expanded}, batch.size)
            with interception.watching(
                methods.n_uses, batch.size, accumulator.receive, replaced=leaves
            ):
                _run(model, loss, batch, methods.input_needs_grad, loss_scale)
            _check_uses(interception.unrecognized)
            accumulator.finish_batch()
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    squares = (leaf.grad.float() / loss_scale).square_()
                    scores[name] += squares.sum(0, keepdim=True)
        if one_by_one:
            add_squared_gradients(model, loss, batch, one_by_one, loss_scale, scores)
        done += batch.size
        report(done)
    assert methods is not None
    accumulator.finish()
    _check_finite(scores)
    return scores, done, methods


def _run(
    model: nn.Module, loss: PerSampleLoss, batch: Batch, input_needs_grad: bool, loss_scale: float
) -> None:
    """One forward and one backward pass over the batch."""
    input = pytree.tree_map(_requiring_grad, batch.input) if input_needs_grad else batch.input
    total = loss.total(model(input), batch.target, batch.size)
    if not torch.isfinite(total):
        raise ValueError(f"the loss is {total.item()} in batch {batch.index}")
    (total * loss_scale).backward()


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


def _tell(methods: Methods, n_parameters: int) -> None:
    if methods.one_by_one:
        names = methods.one_by_one
        listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        logger.warning(
            "%d of %d parameters are measured sample by sample, which is exact but slow: %s",
            len(names),
            n_parameters,
            listed,
        )


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        # one read pass: a score is not negative, and a NaN is larger than any number here
        if score.numel() and not torch.isfinite(score.amax()):
            raise ValueError(
                f"the sensitivity of {name} is not finite: its gradients are, or overflow"
            )


def _requiring_grad(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_(True) if floats else value
