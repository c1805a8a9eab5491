"""The kernels that read entries and channels, interpreted, against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.take import take_channels, take_entries


@pytest.mark.parametrize("nnz", [1, 255, 256, 700])
def test_entries_are_those_of_torch(nnz: int) -> None:
    generator = torch.Generator().manual_seed(nnz)
    matrix = torch.randn(30, 40, generator=generator)
    matrix[3, 5], matrix[29, 39] = float("nan"), float("inf")
    index = torch.randint(1200, (nnz,), generator=generator, dtype=torch.int32)
    index[0], index[-1] = 125, 1199
    found = take_entries(matrix, index)
    torch.testing.assert_close(
        found, matrix.view(-1).index_select(0, index), rtol=0.0, atol=0.0, equal_nan=True
    )


def test_a_position_outside_of_the_matrix_shows() -> None:
    index = torch.tensor([-1, 0, 11, 12], dtype=torch.int32)
    found = take_entries(torch.arange(12.0).view(3, 4), index)
    assert found.isnan().tolist() == [True, False, False, True]
    assert found[1:3].tolist() == [0.0, 11.0]


def test_the_launch_of_other_tensors_of_the_same_sizes_is_theirs() -> None:
    index = torch.arange(0, 12, 2, dtype=torch.int32)
    for first in (0.0, 100.0):
        matrix = torch.arange(12.0).view(3, 4) + first
        assert take_entries(matrix, index).tolist() == [first + 2 * n for n in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_tokens", "n_taken"), [(1, 1), (33, 16), (70, 80)])
def test_channels_are_those_of_torch(n_tokens: int, n_taken: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n_taken)
    wide = torch.randn(n_tokens, 100, generator=generator).to(dtype)
    channels = torch.randint(50, (n_taken,), generator=generator, dtype=torch.int32)
    for given in (wide, wide[:, ::2], wide.t().contiguous().t()):
        found = take_channels(given, channels)
        assert found.is_contiguous()
        assert torch.equal(found, given.index_select(1, channels))
