"""Sums in the order of ranks, and errors that all processes hear of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from spt_kernels.distributed import Processes, sum_in_place
from spt_kernels.distributed import sum as sums
from spt_kernels.errors import OtherProcessFailed

WORLD = dist.group


def own_values(rank: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank))


def check_sums_are_those_of_a_loop_over_ranks_to_the_bit(place: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    shapes = [(3, 7), (), (1,), (0,), (1000,), (5,)]
    truth = [own_values(0, shape, n) for n, shape in enumerate(shapes)]
    for other in range(1, size):
        for n, shape in enumerate(shapes):
            truth[n] = truth[n] + own_values(other, shape, n)
    piece = sums._PIECE
    for sums._PIECE in (piece, 8):  # all at once, and tensors cut into several pieces
        tensors = [own_values(rank, shape, n) for n, shape in enumerate(shapes)]
        sum_in_place([*tensors, torch.ones(2, dtype=torch.int64)], WORLD.WORLD)
        assert all(map(torch.equal, tensors, truth))
    sums._PIECE = piece


def check_shares_are_all_there_is(place: Path) -> None:
    processes = Processes.of(WORLD.WORLD)
    assert (processes.rank, processes.size) == (dist.get_rank(), dist.get_world_size())
    for n in (0, 1, 2, 3, 5, 17):
        assert processes.share(n) == len(range(processes.rank, n, processes.size))
        assert sum(processes.gather(processes.share(n))) == n


def check_what_fails_in_one_fails_in_all(place: Path) -> None:
    processes = Processes.of(WORLD.WORLD)
    last = processes.size - 1

    def act() -> int:
        if processes.rank == last:
            raise KeyError("what is wrong here")
        return 1

    expected = KeyError if processes.rank == last else OtherProcessFailed
    with pytest.raises(expected, match="what is wrong here") as raised:
        processes.together(act)
    assert processes.rank == last or f"process {last} cannot go on" in str(raised.value)
    assert processes.together(lambda: 7) == 7, "they go on in step"


def check_the_first_decides(place: Path) -> None:
    processes = Processes.of(WORLD.WORLD)
    made = processes.from_first(lambda: {"from": processes.rank})
    assert made == {"from": 0}

    def fail() -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError if processes.is_first else OtherProcessFailed, match="no such"):
        processes.from_first(fail)


def check_a_part_of_the_processes_can_be_a_group(place: Path) -> None:
    size = dist.get_world_size()
    group = dist.new_group([size - 1])
    if dist.get_rank() == size - 1:
        assert Processes.of(group).size == 1, "alone in it"
        return
    with pytest.raises(ValueError, match="not in it"):
        Processes.of(group)
