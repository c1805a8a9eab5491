"""The kernel of a LayerNorm's chosen entries, interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.sparse_norm_grad import sparse_norm_grad
from spt_kernels.reference import sparse_norm_grad as reference
from tests.ops.test_sparse_norm_grad import DTYPES, SHAPES, index, made
from tests.tolerance import assert_within_budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_entries(shape: Any, dtype: torch.dtype) -> None:
    n_tokens, n_channels, *positions = shape
    tensors = made(n_tokens, n_channels, dtype, "cpu")
    indices = [index(each, "cpu") for each in positions]
    found = sparse_norm_grad(*tensors, *indices)
    assert found.dtype == torch.float32
    truth = reference.sparse_norm_grad(*(t.double() for t in tensors), *indices)
    plain = reference.sparse_norm_grad(*tensors, *indices)
    assert_within_budget(found, plain, truth, roundings=4.0)
    assert torch.equal(found, sparse_norm_grad(*tensors, *indices))


def test_a_channel_that_there_is_none_of_shows_and_spoils_no_other() -> None:
    tensors = made(50, 24, torch.float32, "cpu")
    chosen = torch.tensor([-1, 3, 24], dtype=torch.int32)
    found = sparse_norm_grad(*tensors, chosen, chosen)
    assert found.isnan().tolist() == [True, False, True] * 2
