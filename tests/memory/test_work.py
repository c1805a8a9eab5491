"""What a call reads and writes, by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spt_kernels.memory.work import WorkCounter
from spt_kernels.ops.launching import as_on_card
from spt_kernels.ops.low_rank import low_rank_up_
from spt_kernels.ops.sparse_norm_grad import sparse_norm_grad
from spt_kernels.ops.write_delta import write_delta


def moved(call: Callable[[], object]) -> int:
    with WorkCounter() as counter:
        call()
    return counter.work().moved_bytes


def test_what_is_written_in_place_is_read_as_well_whether_it_is_returned_or_not() -> None:
    with FakeTensorMode(), as_on_card():
        base, inner, factor = torch.ones(32, 64), torch.ones(32, 4), torch.ones(64, 4)
        by_hand = 4 * (2 * 32 * 64 + 32 * 4 + 64 * 4)
        assert moved(lambda: base.addmm_(inner, factor.t())) == by_hand
        assert moved(lambda: low_rank_up_(base, inner, factor)) == by_hand
        assert moved(lambda: torch._foreach_add_([base, inner], 1.0)) == 4 * 2 * (32 * 64 + 32 * 4)


def test_a_weight_is_not_moved_for_the_few_values_that_are_written_into_it() -> None:
    with FakeTensorMode():
        index, originals, delta = torch.ones(8).int(), torch.ones(8), torch.ones(8)
        weight = torch.ones(1000)
        assert moved(lambda: write_delta([weight], [index], [originals], [delta])) == 3 * 4 * 8


def test_of_an_activation_of_which_few_channels_are_read_a_card_moves_sectors() -> None:
    with FakeTensorMode():
        gy, x, statistic = torch.ones(100, 64).half(), torch.ones(100, 64).half(), torch.ones(100)
        two, one = torch.ones(2).int(), torch.ones(1).int()
        of_norm = 100 * 32 * (3 + 2) + 2 * statistic.nbytes + 2 * 4 * 3
        assert moved(lambda: sparse_norm_grad(gy, x, statistic, statistic, two, one)) == of_norm
        assert moved(lambda: sparse_norm_grad(gy, None, None, None, None, two)) == 100 * 64 + 16
        many = torch.ones(8).int()  # in sectors of which each is read whole
        assert moved(lambda: sparse_norm_grad(gy, None, None, None, None, many)) == gy.nbytes + 64
