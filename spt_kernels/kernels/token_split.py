"""How a sum over tokens is split among programs: by shapes and the card alone, never by timing."""

from __future__ import annotations

import functools

import torch

from .card import Launch, cdiv, multiprocessors_of

# What one more split adds, as a share of the work of a program that takes all tokens
_COST_OF_A_SPLIT = 0.02


@functools.lru_cache(1024)
def split_tokens(
    n_tokens: int, programs: int, launch: Launch, device: torch.device
) -> tuple[int, int]:
    """Number of splits and tokens in each, whole blocks, such that rounds of programs are full.

    Args:
        n_tokens: tokens to sum over.
        programs: programs of one split.
        launch: tokens that a program reads at a time, and programs on a multiprocessor.
        device: the card.
    """
    resident = launch.programs_per_sm * multiprocessors_of(device)
    most = max(1, min(launch.most_splits, n_tokens // launch.least_tokens))

    def cost(splits: int) -> float:
        rounds = cdiv(splits * programs, resident)
        return rounds / splits * (1 + _COST_OF_A_SPLIT * splits)

    splits = min(range(1, most + 1), key=cost)
    tokens_per_split = cdiv(cdiv(n_tokens, splits), launch.tokens) * launch.tokens
    return cdiv(n_tokens, tokens_per_split), tokens_per_split
