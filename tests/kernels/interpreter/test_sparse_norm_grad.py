"""The kernel of a LayerNorm's chosen entries, interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.sparse_norm_grad import sparse_norm_grad
from tests.ops.test_sparse_norm_grad import DTYPES, SHAPES, check_entries, made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_entries(shape: Any, dtype: torch.dtype) -> None:
    check_entries(sparse_norm_grad, shape, dtype, "cpu")


def test_a_channel_that_there_is_none_of_shows_and_spoils_no_other() -> None:
    tensors = made(50, 24, torch.float32, "cpu")
    chosen = torch.tensor([-1, 3, 24], dtype=torch.int32)
    found = sparse_norm_grad(*tensors, chosen, chosen)
    assert found.isnan().tolist() == [True, False, True] * 2
