"""Squared gradients of a table that tokens look their rows up in, as an embedding of words is."""

from __future__ import annotations

import torch
from torch import Tensor

from .derived import derivation_of
from .uses import Factors, Role, Use, tokens_of


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    """`F.embedding`, but where it edits the table or counts words over the batch."""
    if not input.ndim or max_norm is not None or scale_grad_by_freq or derivation_of(weight):
        return None

    def rule(samples: int, grad_output: Tensor, input: Tensor | None = None) -> Factors:
        assert input is not None
        if padding_idx is not None:  # no gradient reaches its row
            is_padding = input == padding_idx % weight.shape[0]
            grad_output = grad_output.masked_fill(is_padding[..., None], 0)
        return Factors(tokens_of(samples, grad_output), input.reshape(samples, -1))

    return Use(input, (Role(weight, "lookup", rule),))


def add_squared_lookups(score: Tensor, grad_output: Tensor, rows: Tensor, scale: float) -> None:
    """`score[r] += Σ over samples of (scale · Σ over the tokens that look up r of grad_output)²`.

    Memory is that of the tokens, whatever the size of the table; the same bits every time.

    Args:
        score: fp32 `[table rows, channels]`; mutated.
        grad_output: `[samples, tokens, channels]`.
        rows: int `[samples, tokens]`, of the table.
        scale: factor on each gradient.
    """
    samples = rows.shape[0]
    of_sample = torch.arange(samples, device=rows.device)[:, None]
    pairs, pair_of_token = (rows.long() * samples + of_sample).unique(return_inverse=True)
    sums = _summed(grad_output.flatten(0, 1).float(), pair_of_token.flatten(), len(pairs))
    found, row_of_pair = (pairs // samples).unique_consecutive(return_inverse=True)
    score[found] += _summed((scale * sums).square_(), row_of_pair, len(found))


def _summed(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    # the backward pass of an embedding: sums without atomics, in a fixed order
    return torch.ops.aten.embedding_dense_backward(values, group, n_groups, -1, False)
