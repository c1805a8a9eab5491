"""Squaring what arrives for each parameter, and adding it to the parameter's score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import squared_grad
from ...ops.launching import is_plain
from .embedding import add_squared_lookups
from .observation import Arrival
from .uses import Factors, Role, whole
from .watched import Piece

# A vector's squares are summed in so many rows on a card, which has too little to do with one
_ROWS_ON_CARD = 32
# What adds the squares of a matrix and of a vector
_LAUNCHERS = squared_grad.launch_matrix, squared_grad.launch_vector
_OPS = squared_grad.accumulate_squared_grad, squared_grad.accumulate_squared_vector_grad


class _Part(NamedTuple):
    """One parameter in one arrival."""

    arrival: Arrival
    piece: Piece
    role: Role


class Accumulator:
    """Turns the arrivals of a backward pass into scores.

    A parameter that the model uses several times has one gradient per sample, the sum over its
    uses: their factors are joined along the tokens before anything is squared.

    Args:
        scores: fp32 by parameter name, shaped like the parameter; mutated.
        n_uses: how many arrivals a backward pass brings for each name.
        scale: factor that undoes a scaling of the loss.
    """

    def __init__(
        self, scores: Mapping[str, Tensor], n_uses: Mapping[str, int], scale: float
    ) -> None:
        self._scores = scores
        self._n_uses = n_uses
        self._scale = scale
        self._rows: dict[str, Tensor] = {}  # of vectors, `[rows, channels]`
        self._waiting: dict[str, list[_Part]] = {}
        self._n_arrived: dict[str, int] = {}

    def receive(self, arrival: Arrival) -> None:
        """Take one arrival of the running backward pass."""
        alone: list[_Part] = []
        for piece, role in arrival.parts:
            name = piece.name
            n_uses = self._n_uses.get(name)
            if n_uses is None:
                continue
            n_arrived = self._n_arrived[name] = self._n_arrived.get(name, 0) + 1
            if n_arrived > n_uses:
                raise RuntimeError(
                    f"{name} is used {n_arrived} times or more for this batch, and {n_uses} times "
                    "for the first one: a model whose uses vary cannot be measured in batches; "
                    "leave the parameter out with exclude"
                )
            part = _Part(arrival, piece, role)
            if n_uses == 1:
                alone.append(part)
                continue
            self._waiting.setdefault(name, []).append(part)
            if n_arrived == n_uses:
                self._add(self._waiting.pop(name))
        if len(alone) == 2 and _are_factor_and_shift(*alone):
            self._add(alone[:1], alone[1])
        else:
            for part in alone:
                self._add([part])

    def finish_batch(self) -> None:
        """Take what is still waiting: uses that this batch's loss did not depend on."""
        for parts in self._waiting.values():
            self._add(parts)
        self._waiting.clear()
        self._n_arrived.clear()

    def finish(self) -> None:
        """Add what is summed in rows to the scores."""
        for name, rows in self._rows.items():
            score = self._scores[name]
            score += rows.sum(0).view_as(score)
        self._rows.clear()

    def _add(self, parts: list[_Part], shift: _Part | None = None) -> None:
        """Square what several uses of one parameter bring, and one of another that shifts them."""
        samples = step = parts[0].arrival.samples
        for arrival, _, role in parts:
            if role.samples_numel:
                step = min(step, role.samples_at_once(arrival.grad_output.shape[0] // samples))
        for first in range(0, samples, step):
            stop = min(first + step, samples)
            factors = [arrival.factors(piece, role, first, stop) for arrival, piece, role in parts]
            is_whole = [of_use.input is None for of_use in factors]
            if parts[0].role.kind != "vector" and True in is_whole:
                self._square_whole(parts, factors)
                if shift is not None:
                    arrival, piece, role = shift
                    self._square(shift, [arrival.factors(piece, role, first, stop)], None)
            else:
                self._square(parts[0], factors, None if shift is None else shift.piece.name)

    def _square_whole(self, parts: list[_Part], factors: list[Factors]) -> None:
        """Square the sum of what several uses bring, where one of them brings it whole."""
        score = self._scores[parts[0].piece.name]
        gradients = [whole(part.role.kind, own) for part, own in zip(parts, factors, strict=True)]
        rows = [gradient.float().reshape(len(gradient), -1) for gradient in gradients]
        of_all = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        score += (self._scale * of_all).square_().sum(0).view_as(score)

    def _square(self, part: _Part, factors: list[Factors], shift: str | None) -> None:
        """Square what comes as two factors, or as one of a vector."""
        name, kind = part.piece.name, part.role.kind
        of_all = factors[0] if len(factors) == 1 else _joined(factors)
        if kind == "lookup":
            assert of_all.input is not None
            add_squared_lookups(self._scores[name], of_all.grad_output, of_all.input, self._scale)
            return
        if torch.float64 in (of_all.grad_output.dtype, getattr(of_all.input, "dtype", None)):
            of_all = _in_fp32(of_all)  # as scores are
        launches = is_plain(of_all.grad_output)
        launches &= of_all.input is None or not of_all.input.is_neg()
        add_matrix, add_vector = _LAUNCHERS if launches else _OPS
        shifts = None if shift is None else self._rows_of(shift)
        if kind == "vector":
            grad_output, input, mean, rstd = of_all
            add_vector(self._rows_of(name), grad_output, input, self._scale, mean, rstd, shifts)
            return
        if of_all.input is not None and of_all.input.dtype != of_all.grad_output.dtype:
            of_all = _in_fp32(of_all)
        score = self._scores[name]
        grad_output, input, *_ = of_all
        assert input is not None
        add_matrix(score.view(score.shape[0], -1), grad_output, input, self._scale)
        if shifts is not None:
            add_vector(shifts, of_all.grad_output, None, self._scale, None, None, None)

    def _rows_of(self, name: str) -> Tensor:
        rows = self._rows.get(name)
        if rows is None:
            score = self._scores[name]
            n_rows = _ROWS_ON_CARD if score.is_cuda else 1
            rows = self._rows[name] = score.new_zeros(n_rows, score.numel())
        return rows


def _are_factor_and_shift(first: _Part, second: _Part) -> bool:
    """Whether they are the weight and the bias of a layer, say, whose gradients come from one."""
    are_whole = first.piece.stop is None and second.piece.stop is None
    is_factor = first.role.kind != "whole" and first.role.needs_input and not first.role.transposed
    # of what a bias is made of, the gradient is another one
    is_shift = second.role.kind == "vector" and not second.role.needs_input
    return are_whole and is_factor and is_shift


def _joined(factors: list[Factors]) -> Factors:
    """Factors of several uses as those of one with the tokens of all."""
    if len({(of_use.input is None, of_use.mean is None) for of_use in factors}) > 1:
        factors = [_multiplied(of_use) for of_use in factors]
    first, *others = (
        None if column[0] is None else torch.cat(column, 1) for column in zip(*factors, strict=True)
    )
    assert first is not None
    return Factors(first, *others)


def _multiplied(factors: Factors) -> Factors:
    """The factors of a vector as one."""
    grad_output, input, mean, rstd = factors
    if input is None:
        return factors
    if mean is not None and rstd is not None:
        input = (input.float() - mean[..., None]) * rstd[..., None]
    return Factors(grad_output.float() * input)


def _in_fp32(factors: Factors) -> Factors:
    input = None if factors.input is None else factors.input.float()
    return factors._replace(grad_output=factors.grad_output.float(), input=input)
