"""Finding out, on two samples, how each parameter of a model can be measured.

Observers assume that a model keeps its samples apart and in order: row by row, or k rows for each.
Both are checked rather than believed: with the loss of one sample alone, no gradient may arrive at
rows of the other. No more is in memory at a time than one sample's gradient of what is derived.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .autograd import has_graph, take_gradients
from .batches import Batch, two_samples
from .calls import Calls
from .comparison import Comparison
from .interception import Interception
from .losses import PerSampleLoss, requiring_grad
from .methods import Methods
from .observation import Arrival

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
    derived: bool = False  # it arrives at what is made of the parameter alone


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
    loss.learn(model, pair.input)
    watch = partial(_watch, model, loss, pair, interception, records, calls)
    # a forward for each: there are models whose graph can be gone through but once
    if any(watch(own) is None for own in range(_SAMPLES)):
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
    derived = {name for name in observed if records[name].derived}
    uncertain = {n: p for n, p in parameters.items() if n not in observed or n in derived}
    expanded: list[str] = []
    one_by_one: list[str] = []
    if uncertain:
        # plain autograd tells which of the others matter at all, and the truth about tokens
        compare = partial(
            _compare,
            model,
            loss,
            pair,
            uncertain,
            lambda own: watch(own, keep=True) if derived else {},
            frozenset(tokens),
            loss_scale,
        )
        comparison = compare(interception.used_without_grad)
        if comparison is None:
            return None
        if not interception.used_without_grad and unrecognized & uncertain.keys() - comparison.used:
            # a graph that a function keeps to itself may be reached through the inputs alone
            by_inputs = compare(True)
            if by_inputs is not None and by_inputs.used > comparison.used:
                comparison, interception.used_without_grad = by_inputs, True
        slack = tolerance**2 * comparison.typical()
        for name in list(derived):
            if not comparison.agrees(name, tolerance, slack):
                derived.remove(name)
                del observed[name]
        # what is made with one that no batch observes is not followed there, and so on
        made_with, dropped = interception.followed, set[str]()
        while lost := [n for n in observed if not made_with.get(n, set()) <= observed.keys()]:
            for name in lost:
                derived.discard(name)
                del observed[name]
            dropped.update(lost)
        needed = (comparison.used & uncertain.keys() - derived) | dropped
        used = [name for name in parameters if name in needed]
        if not used and not observed:
            raise _independent(loss)
        possible = {name: parameters[name] for name in tokens if name in used}
        expanded = _expandable(model, loss, pair, interception, possible, comparison, tolerance)
        one_by_one = [name for name in used if name not in expanded]
    interception.unrecognized.clear()
    if not observed and not expanded:
        # No batch is run in which a later use would be noticed; to ask for all costs no more
        one_by_one = list(parameters)
    measured = {*observed, *expanded, *one_by_one}
    idle = tuple(name for name in parameters if name not in measured)
    return Methods(
        observed,
        # also what a model only looks at the values of, which never comes to the loss
        frozenset(derived | (interception.followed.keys() & observed.keys())),
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
    used: set[str] = set()

    def note(_: int, name: str, gradient: Tensor) -> None:
        used.add(name)

    if not take_gradients(model, loss, one, parameters, loss_scale, needs_grad, note):
        return None
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
    own: int,
    *,
    keep: bool = False,
) -> dict[str, Tensor] | None:
    """Run both samples forward and the loss of one backward, and record what arrives.

    Returns:
        The gradients of that sample by parameter, where they come through what is made of that
        alone, if they are to be kept; None where one of the two samples does not count.
    """
    gradients: dict[str, Tensor] = {}
    n_arrivals = dict.fromkeys(records, 0)

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
            record.derived |= role.derived and arrives
            if role.derived and arrives and keep:
                [gradient] = arrival.factors(piece, role, own, own + 1).grad_output
                before = gradients.get(piece.name)
                gradients[piece.name] = gradient if before is None else before + gradient

    inputs = pytree.tree_map(requiring_grad, pair.input)
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    watching = interception.watching(records, _SAMPLES, receive, on_use=calls.note_use)
    with calls.following(), watching:
        outputs = loss.outputs(model, inputs, _SAMPLES)
        if not has_graph(outputs):
            return gradients  # every use was out of sight
        losses = loss.of_each(outputs, pair.target, _SAMPLES)
        if losses is None:
            return None
        if not torch.isfinite(losses[own]):
            raise ValueError(f"the loss is {losses[own].item()} in batch {pair.index}")
        interception.backward(losses[own])
        if any(x.grad is not None and _crosses(x.grad, own) for x in leaves):
            raise ValueError(
                "the loss of one sample depends on the other samples of its batch (a BatchNorm in "
                "training mode does that): then no sample has a gradient of its own; measure in "
                "eval mode, where a BatchNorm must have running statistics"
            )
    return gradients


def _compare(
    model: nn.Module,
    loss: PerSampleLoss,
    pair: Batch,
    parameters: Mapping[str, Tensor],
    observed_of: Callable[[int], dict[str, Tensor] | None],
    kept: Collection[str],
    loss_scale: float,
    needs_grad: bool,
) -> Comparison | None:
    """Hold what was observed of each sample against what plain autograd gives.

    Args:
        model: of which `parameters` are frozen.
        loss: of each sample.
        pair: the two samples.
        parameters: those to ask autograd for.
        observed_of: gives a sample's gradients by name, which are let go as they are compared, or
            None where it does not count.
        kept: names of those whose gradients the comparison keeps.
        loss_scale: factor on the loss in backward passes.
        needs_grad: see `Methods.input_needs_grad`.

    Returns:
        The comparison, without samples that do not count alone; None where `observed_of` has none.
    """
    comparison = Comparison(kept)
    for own in range(_SAMPLES):
        observed = observed_of(own)
        if observed is None:
            return None

        def take(
            _: int, name: str, gradient: Tensor, own: int = own, found: dict[str, Tensor] = observed
        ) -> None:
            comparison.take(own, name, gradient, found.pop(name, None))

        alone = pair.samples(own, own + 1)
        if take_gradients(model, loss, alone, parameters, loss_scale, needs_grad, take):
            for name, gradient in observed.items():
                comparison.take(own, name, None, gradient)
        observed.clear()
    return comparison


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
    true: Comparison,
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
    comparison = Comparison()
    for name, leaf in leaves.items():
        for own, gradient in enumerate([] if leaf.grad is None else leaf.grad[:, None]):
            comparison.take(own, name, true.kept.get((own, name)), gradient)
    return [name for name in leaves if comparison.agrees(name, tolerance)]


def expand(tokens: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Leaves of shape `[batch, ...]` with one copy of each token per sample, in no memory."""
    return {
        name: token.detach().expand(batch, *token.shape[1:]).requires_grad_(True)
        for name, token in tokens.items()
    }
