"""Squaring what arrives for each parameter, and adding it to the parameter's score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...ops.squared_grad import accumulate_squared_grad, accumulate_squared_vector_grad
from .interception import Arrival
from .uses import Factors


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
        self._waiting: dict[str, list[Arrival]] = {}
        self._n_arrived: dict[str, int] = {}

    def receive(self, arrival: Arrival) -> None:
        """Take one arrival of the running backward pass."""
        name = arrival.piece.name
        if name not in self._n_uses:
            return
        self._n_arrived[name] = self._n_arrived.get(name, 0) + 1
        if self._n_arrived[name] > self._n_uses[name]:
            raise RuntimeError(
                f"{name} is used {self._n_arrived[name]} times or more for this batch, and "
                f"{self._n_uses[name]} times for the first one: a model whose uses vary cannot be "
                "measured in batches; leave the parameter out with exclude"
            )
        self._waiting.setdefault(name, []).append(arrival)
        if self._n_arrived[name] == self._n_uses[name]:
            self._add(self._waiting.pop(name))

    def finish_batch(self) -> None:
        """Take what is still waiting: uses that this batch's loss did not depend on."""
        for arrivals in self._waiting.values():
            self._add(arrivals)
        self._waiting.clear()
        self._n_arrived.clear()

    def _add(self, arrivals: list[Arrival]) -> None:
        samples = arrivals[0].grad_output.shape[0]
        steps = [arrival.role.samples_at_once(arrival.grad_output.shape[1]) for arrival in arrivals]
        step = min((step for step in steps if step is not None), default=samples)
        score = self._scores[arrivals[0].piece.name]
        for start in range(0, samples, step):
            self._add_samples(score, [_factors(a, start, start + step) for a in arrivals], arrivals)

    def _add_samples(self, score: Tensor, factors: list[Factors], arrivals: list[Arrival]) -> None:
        kind = arrivals[0].role.kind
        if kind == "whole":
            gradients = torch.stack([first for first, _ in factors]).sum(0)  # [samples, *shape]
            score += (self._scale * gradients.float()).square_().sum(0)
            return
        grad_output, input = _join(factors)
        if kind == "matrix":
            assert input is not None
            matrix = score.view(score.shape[0], -1)
            accumulate_squared_grad(matrix, grad_output, input, self._scale)
        else:
            accumulate_squared_vector_grad(score.view(-1), grad_output, input, self._scale)


def _factors(arrival: Arrival, start: int, stop: int) -> Factors:
    input = None if arrival.input is None else arrival.input[start:stop]
    grad_output, input = arrival.role.rule(arrival.grad_output[start:stop], input)
    piece = arrival.piece
    if piece.stop is None:
        return grad_output, input
    part = slice(piece.start, piece.stop)
    return grad_output[..., part], None if input is None else input[..., part]


def _join(factors: list[Factors]) -> Factors:
    grad_outputs = [grad_output for grad_output, _ in factors]
    inputs = [input for _, input in factors if input is not None]
    grad_output = grad_outputs[0] if len(factors) == 1 else torch.cat(grad_outputs, 1)
    if not inputs:
        return _as_measured(grad_output), None
    input = inputs[0] if len(factors) == 1 else torch.cat(inputs, 1)
    if input.dtype != grad_output.dtype:
        return grad_output.float(), input.float()
    return _as_measured(grad_output), _as_measured(input)


def _as_measured(tensor: Tensor) -> Tensor:
    # scores are fp32, so a float64 model is measured in fp32 from here on
    return tensor.float() if tensor.dtype == torch.float64 else tensor
