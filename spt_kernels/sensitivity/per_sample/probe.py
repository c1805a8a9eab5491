"""Finding out, on two samples, how each parameter of a model can be measured.

Observers assume that a model keeps its samples apart and in order: row by row, or k rows for each.
Both are checked rather than believed: with the loss of one sample alone, no gradient may arrive at
rows of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .autograd import has_graph, requiring_grad, sample_gradients
from .batches import Batch, two_samples
from .calls import Calls
from .interception import Arrival, Interception
from .losses import PerSampleLoss
from .methods import Methods

_SAMPLES = 2
# Some models sum over a batch what cancels out but for its rounding, far below that of a gradient
_ROUNDING = 1e-6


@dataclass
class _Record:
    """What was seen of one parameter."""

    n_uses: int = 0
    kinds: set[str] = field(default_factory=set)
    crosses: bool = False  # gradient at rows of the other sample
    arrives: bool = False  # gradient at rows of its own
    # by sample, of what is made of the parameter alone
    gradients: dict[int, Tensor] = field(default_factory=dict)


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
) -> Methods | None:
    """Choose a method for each of `parameters`, which must be frozen.

    None where one of the two samples does not count.

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
    pair = two_samples(batch)
    records = {name: _Record() for name in parameters}
    calls = Calls(layers)
    if not loss.parts(model, pair.input):
        return _all_one_by_one(model, loss, batch, parameters, interception, calls, loss_scale)
    with calls.following():
        if not _watch(model, loss, pair, interception, records, calls):
            return None
    unrecognized = interception.unrecognized.copy()

    observed = {
        name: record.n_uses
        for name, record in records.items()
        if record.arrives
        and not record.crosses
        and len(record.kinds) == 1
        and name not in unrecognized
    }
    derived = {name for name in observed if records[name].gradients}
    uncertain = {n: p for n, p in parameters.items() if n not in observed or n in derived}
    expanded: list[str] = []
    one_by_one: list[str] = []
    if uncertain:
        # plain autograd tells which of the others matter at all, and the truth about tokens
        needs_grad = interception.used_without_grad
        gradients = sample_gradients(model, loss, pair, uncertain, loss_scale, needs_grad)
        truth = [sample for sample in gradients if sample is not None]
        slack = tolerance**2 * _typical(truth)
        for name in list(derived):
            if not _agrees(records[name].gradients, name, truth, tolerance, slack):
                derived.remove(name)
                del observed[name]
        used = [
            name
            for name in uncertain
            if name not in derived and any(sample[name] is not None for sample in truth)
        ]
        if not used and not observed:
            raise _independent(loss)
        possible = {name: parameters[name] for name in tokens if name in used}
        expanded = _expandable(model, loss, pair, interception, possible, truth, tolerance)
        one_by_one = [name for name in used if name not in expanded]
    interception.unrecognized.clear()
    if not observed and not expanded:
        # No batch is run in which a later use would be noticed; to ask for all costs no more
        one_by_one = list(parameters)
    measured = {*observed, *expanded, *one_by_one}
    idle = tuple(name for name in parameters if name not in measured)
    return Methods(
        observed,
        frozenset(derived),
        tuple(expanded),
        tuple(one_by_one),
        idle,
        tuple(name for name in idle if name not in unrecognized),
        interception.used_without_grad,
        frozenset(calls.called),
    )


def _all_one_by_one(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    interception: Interception,
    calls: Calls,
    loss_scale: float,
) -> Methods | None:
    """The methods where each sample's loss takes a forward of its own; None as `probe` has it."""
    one = batch.samples(0, 1)
    watching = interception.watching(parameters, 1, lambda arrival: None, on_use=calls.note_use)
    with calls.following(), watching:
        loss.outputs(model, one.input, 1)
    interception.unrecognized.clear()
    needs_grad = interception.used_without_grad
    [gradients] = sample_gradients(model, loss, one, parameters, loss_scale, needs_grad)
    if gradients is None:
        return None
    used = tuple(name for name, gradient in gradients.items() if gradient is not None)
    if not used:
        raise _independent(loss)
    # another sample may depend on others, as where each token has its experts: all are asked for
    called = frozenset(calls.called)
    return Methods({}, frozenset(), (), tuple(parameters), (), (), needs_grad, called)


def _independent(loss: PerSampleLoss) -> ValueError:
    return ValueError(
        f"loss_fn {loss.name}: the loss does not depend on any parameter that is measured"
    )


def _watch(
    model: nn.Module,
    loss: PerSampleLoss,
    pair: Batch,
    interception: Interception,
    records: Mapping[str, _Record],
    calls: Calls,
) -> bool:
    """Run both samples forward and the loss of each backward, and record what arrives.

    Returns:
        Whether both samples count.
    """
    own = 0
    n_arrivals: dict[str, int] = {}

    def receive(arrival: Arrival) -> None:
        by_sample = arrival.grad_output.chunk(_SAMPLES)
        arrives, crosses = bool(by_sample[own].any()), _crosses(arrival.grad_output, own)
        for piece, role in arrival.parts:
            record = records[piece.name]
            n_arrivals[piece.name] += 1
            record.n_uses = max(record.n_uses, n_arrivals[piece.name])
            record.kinds.add(role.kind)
            record.arrives |= arrives
            record.crosses |= crosses
            if role.derived and arrives:
                [gradient] = arrival.factors(piece, role, own, own + 1).grad_output
                before = record.gradients.get(own)
                record.gradients[own] = gradient if before is None else before + gradient

    inputs = pytree.tree_map(requiring_grad, pair.input)
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    with interception.watching(records, _SAMPLES, receive, on_use=calls.note_use):
        outputs = loss.outputs(model, inputs, _SAMPLES)
        if not has_graph(outputs):
            return True  # every use was out of sight
        losses = loss.of_each(outputs, pair.target, _SAMPLES)
        if losses is None:
            return False
        for own in range(_SAMPLES):
            if not torch.isfinite(losses[own]):
                raise ValueError(f"the loss is {losses[own].item()} in batch {pair.index}")
            n_arrivals = dict.fromkeys(records, 0)
            losses[own].backward(retain_graph=own == 0)
            if any(x.grad is not None and _crosses(x.grad, own) for x in leaves):
                raise ValueError(
                    "the loss of one sample depends on the other samples of its batch (a BatchNorm "
                    "in training mode does that): then no sample has a gradient of its own; "
                    "measure in eval mode"
                )
            for x in leaves:
                x.grad = None
    return True


def _crosses(grad: Tensor, own: int) -> bool:
    """Whether a gradient of one sample's loss is at rows of the other, beyond rounding."""
    mine, others = (grad.chunk(_SAMPLES)[sample] for sample in (own, 1 - own))
    if not others.any():
        return False
    return bool(others.float().norm() > _ROUNDING * mine.float().norm())


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
            outputs = loss.outputs(model, pair.input, _SAMPLES)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return []  # the model needs the shape as it is: it ran above, so this is the reason
        loss.total(outputs, pair.target, _SAMPLES)[0].backward()
    return [
        name
        for name, leaf in leaves.items()
        if leaf.grad is not None
        and _agrees(dict(enumerate(leaf.grad[:, None])), name, truth, tolerance)
    ]


def expand(tokens: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Leaves of shape `[batch, ...]` with one copy of each token per sample, in no memory."""
    return {
        name: token.detach().expand(batch, *token.shape[1:]).requires_grad_(True)
        for name, token in tokens.items()
    }


def _agrees(
    gradients: Mapping[int, Tensor],
    name: str,
    truth: list[dict[str, Tensor | None]],
    tolerance: float,
    slack: float = 0.0,
) -> bool:
    """Whether gradients by sample are those that plain autograd gives, but for `slack` in each."""
    expected = [sample[name] for sample in truth]
    like = next((g for g in (*gradients.values(), *expected) if g is not None), None)
    if like is None:
        return False
    zeros = torch.zeros_like(like)
    mine = torch.stack([gradients.get(i, zeros) for i in range(len(truth))])
    theirs = torch.stack([zeros if g is None else g for g in expected])
    allowed = tolerance * theirs.norm() + slack * theirs.numel() ** 0.5
    return bool((mine - theirs).norm() <= allowed)


def _typical(truth: list[dict[str, Tensor | None]]) -> float:
    """The root mean square of the largest gradients: rounding leaves some of it where is none."""
    gradients = [g for sample in truth for g in sample.values() if g is not None and g.numel()]
    return max((float(g.norm()) / g.numel() ** 0.5 for g in gradients), default=0.0)
