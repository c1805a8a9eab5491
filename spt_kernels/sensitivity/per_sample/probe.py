"""Finding out, on two samples, how each parameter of a model can be measured.

Observers assume that a model keeps its samples apart and in order: row by row, or k rows for each.
Both are checked rather than believed: with the loss of one sample alone, no gradient may arrive at
rows of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .autograd import sample_gradients
from .batches import Batch
from .calls import Calls
from .interception import Arrival, Interception
from .losses import PerSampleLoss

_SAMPLES = 2


@dataclass(frozen=True)
class Methods:
    """How each parameter is measured; one that the loss does not depend on is named nowhere.

    Attributes:
        n_uses: observed parameters, with the number of their uses in one forward pass.
        expanded: parameters shared by all samples as `[1, ...]`, replaced by `[samples, ...]`.
        one_by_one: parameters for which only plain autograd on single samples is exact.
        input_needs_grad: whether the model's checkpoints pass on gradients only then.
        called: the layers that the model uses by calls alone.
    """

    n_uses: Mapping[str, int]
    expanded: tuple[str, ...]
    one_by_one: tuple[str, ...]
    input_needs_grad: bool
    called: frozenset[nn.Module]


@dataclass
class _Record:
    """What was seen of one parameter."""

    n_uses: int = 0
    kinds: set[str] = field(default_factory=set)
    crosses: bool = False  # gradient at rows of the other sample
    arrives: bool = False  # gradient at rows of its own


def probe(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    interception: Interception,
    tokens: tuple[str, ...],
    layers: Iterable[nn.Module],
    loss_scale: float,
    tolerance: float,
) -> Methods:
    """Choose a method for each of `parameters`, which must be frozen.

    Args:
        model: in the mode in which it will be measured.
        loss: of each sample.
        batch: any samples.
        parameters: what will be measured, by name.
        interception: of these.
        tokens: those among them of shape `[1, ...]` that may be expanded.
        layers: those of which to tell whether the model calls them.
        loss_scale: factor on the loss in backward passes.
        tolerance: largest relative difference between two ways to compute the same gradient.

    Raises:
        ValueError: samples influence each other's loss, or the loss depends on no parameter.
    """
    pair = _two_samples(batch)
    records = {name: _Record() for name in parameters}
    calls = Calls(layers)
    for own in range(_SAMPLES):
        with calls.following():
            _watch_one(model, loss, pair, interception, own, records, calls)
    unrecognized = interception.unrecognized.copy()

    observed = {
        name: record.n_uses
        for name, record in records.items()
        if record.arrives
        and not record.crosses
        and len(record.kinds) == 1
        and name not in unrecognized
    }
    uncertain = {name: p for name, p in parameters.items() if name not in observed}
    expanded: list[str] = []
    one_by_one: list[str] = []
    if uncertain:
        # plain autograd tells which of the others matter at all, and the truth about tokens
        truth = list(sample_gradients(model, loss, pair, uncertain, loss_scale))
        used = [name for name in uncertain if any(sample[name] is not None for sample in truth)]
        if not used and not observed:
            raise ValueError("loss_fn: the loss does not depend on any candidate parameter")
        possible = {name: parameters[name] for name in tokens if name in used}
        expanded = _expandable(model, loss, pair, interception, possible, truth, tolerance)
        one_by_one = [name for name in used if name not in expanded]
    interception.unrecognized.clear()
    return Methods(
        observed,
        tuple(expanded),
        tuple(one_by_one),
        interception.used_without_grad,
        frozenset(calls.called),
    )


def _watch_one(
    model: nn.Module,
    loss: PerSampleLoss,
    pair: Batch,
    interception: Interception,
    own: int,
    records: Mapping[str, _Record],
    calls: Calls,
) -> None:
    """Run both samples forward and the loss of sample `own` backward, and record what arrives."""
    n_arrivals = dict.fromkeys(records, 0)

    def receive(arrival: Arrival) -> None:
        by_sample = arrival.grad_output.chunk(_SAMPLES)
        arrives, crosses = bool(by_sample[own].any()), bool(by_sample[1 - own].any())
        for piece, role in arrival.parts:
            record = records[piece.name]
            n_arrivals[piece.name] += 1
            record.n_uses = max(record.n_uses, n_arrivals[piece.name])
            record.kinds.add(role.kind)
            record.arrives |= arrives
            record.crosses |= crosses

    inputs = pytree.tree_map(_requiring_grad, pair.input)
    with interception.watching(records, _SAMPLES, receive, on_use=calls.note_use):
        outputs = model(inputs)
        if not _needs_grad(outputs):
            return  # every use was out of sight
        own_loss = loss.of_sample(outputs, pair.target, _SAMPLES, own)
        if not torch.isfinite(own_loss):
            raise ValueError(f"the loss is {own_loss.item()} in batch {pair.index}")
        own_loss.backward()
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.grad is not None and leaf.grad[1 - own].any():
            raise ValueError(
                "the loss of one sample depends on the other samples of its batch (a BatchNorm in "
                "training mode does that): then no sample has a gradient of its own; measure in "
                "eval mode"
            )


def _expandable(
    model: nn.Module,
    loss: PerSampleLoss,
    pair: Batch,
    interception: Interception,
    tokens: Mapping[str, Tensor],
    truth: list[dict[str, Tensor | None]],
    tolerance: float,
) -> list[str]:
    """Names of the tokens whose expansion gives the gradients that plain autograd gives."""
    if not tokens:
        return []
    leaves = expand(tokens, _SAMPLES)
    with interception.watching((), _SAMPLES, lambda arrival: None, replaced=leaves):
        try:
            outputs = model(pair.input)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return []  # the model needs the shape as it is: it ran above, so this is the reason
        loss.total(outputs, pair.target, _SAMPLES).backward()
    return [name for name, leaf in leaves.items() if _agrees(leaf, name, truth, tolerance)]


def expand(tokens: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Leaves of shape `[batch, ...]` with one copy of each token per sample, in no memory."""
    return {
        name: token.detach().expand(batch, *token.shape[1:]).requires_grad_(True)
        for name, token in tokens.items()
    }


def _agrees(
    leaf: Tensor, name: str, truth: list[dict[str, Tensor | None]], tolerance: float
) -> bool:
    if leaf.grad is None:
        return False
    gradients = [sample[name] for sample in truth]
    expected = torch.cat([torch.zeros_like(leaf[:1]) if g is None else g for g in gradients])
    return bool((leaf.grad - expected).norm() <= tolerance * expected.norm())


def _two_samples(batch: Batch) -> Batch:
    if batch.size >= _SAMPLES:
        return batch.samples(0, _SAMPLES)

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) else value

    input, target = pytree.tree_map(twice, (batch.input, batch.target))
    return Batch(batch.index, input, target, _SAMPLES)


def _requiring_grad(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_(True) if floats else value


def _needs_grad(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(tree))
