"""The threads that C++ works on, in a process that was forked from one that had used them."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from spt_kernels import native


def drop(values: torch.Tensor) -> None:
    native.dropout(values, values, 1, 2, 1 << 31, 0)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    values = torch.ones(1 << 20)  # made here: torch's own operations wait forever in a fork
    try:
        drop(values)
        child = multiprocessing.get_context("fork").Process(target=drop, args=(values,))
        child.start()
        child.join(timeout=10)
        is_stuck = child.is_alive()
        child.kill()
        child.join()
    finally:
        torch.set_num_threads(before)
    assert not is_stuck
    assert child.exitcode == 0
