"""The address table, and its way to the device as arguments of launches, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.address_table import address_table, upload, upload_as_arguments

CPU = torch.device("cpu")


def test_rows_hold_first_program_size_addresses_and_numbers() -> None:
    tensors = [torch.zeros(5), torch.zeros(0), torch.zeros(9)]
    table, n_programs = address_table([5, 0, 9], 4, [tensors, [7, 8, 9]])
    assert n_programs == 2 + 0 + 3
    assert table.tolist() == [
        [0, 5, tensors[0].data_ptr(), 7],
        [2, 0, tensors[1].data_ptr(), 8],
        [2, 9, tensors[2].data_ptr(), 9],
    ]


@pytest.mark.parametrize("n", [1, 16, 17, 50])
def test_words_survive_the_way_through_arguments(n: int) -> None:
    # values that Triton would specialise on (0, 1, multiples of 16), and some beyond 32 bits
    words = torch.tensor([0, 1, 16, -1, 2**40 + 3, -(2**62), 2**31 - 1, 127])[torch.arange(n) % 8]
    assert torch.equal(upload_as_arguments(words.view(n, 1), CPU), words.view(n, 1))
    numbers = torch.linspace(-3, 1e300, 2 * n, dtype=torch.float64).view(n, 2)
    assert torch.equal(upload_as_arguments(numbers, CPU), numbers)
    assert torch.equal(upload(numbers, CPU), numbers)
