"""A sum over tokens is split into whole blocks, which programs of a card share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.card import Launch
from spt_kernels.kernels.token_split import split_tokens


@pytest.mark.parametrize("programs", [1, 6, 48, 5000])
@pytest.mark.parametrize("n_tokens", [1, 511, 1024, 12_608])
def test_splits_cover_all_tokens_in_whole_blocks(n_tokens: int, programs: int) -> None:
    launch = Launch(tokens=32, num_warps=4, num_stages=3, programs_per_sm=2)
    splits, tokens = split_tokens(n_tokens, programs, launch, torch.device("cpu"))
    assert tokens % 32 == 0
    assert (splits - 1) * tokens < n_tokens <= splits * tokens
    assert splits == 1 or tokens >= 512 - 32
    # 16 programs are resident: with 5,000 a split gains nothing
    assert programs < 5000 or splits == 1
