"""Launches that are prepared once for all layers that are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.prepared_launch import PreparedLaunches
from spt_kernels.kernels.rebuild_input import layer_norm_kernel


def prepared(
    launches: PreparedLaunches, *tensors: Tensor, n_rows: int = 4, tile: int = 16
) -> object:
    sizes, constants = (n_rows, 16, 16), (False, False, tile, tile)
    arguments = (*tensors, *sizes, *constants)
    return launches.prepared(layer_norm_kernel, 1, tensors, sizes, constants, arguments, {})


def tensor(dtype: torch.dtype = torch.float32, *, aligned: bool = True) -> Tensor:
    """At an address that vectors of 16 bytes fit or do not."""
    return torch.zeros(65, dtype=dtype)[int(not aligned) :]


def test_layers_alike_share_a_launch() -> None:
    launches = PreparedLaunches()
    one = prepared(launches, tensor(), tensor())
    assert prepared(launches, tensor(), tensor()) is one
    for other in (
        prepared(launches, tensor(), tensor(), n_rows=5),
        prepared(launches, tensor(), tensor(), tile=32),
        prepared(launches, tensor(torch.bfloat16), tensor()),
        prepared(launches, tensor(aligned=False), tensor()),
    ):
        assert other is not one


def test_a_launch_is_of_tensors_each_aligned_as_its_own_were() -> None:
    launches = PreparedLaunches()
    made = {
        pattern: prepared(launches, *(tensor(aligned=aligned) for aligned in pattern))
        for pattern in ((True, True), (True, False), (False, True), (False, False))
    }
    # that of one would read the other's by vectors
    assert len({id(launch) for launch in made.values()}) == 4
    for pattern, launch in made.items():
        assert prepared(launches, *(tensor(aligned=aligned) for aligned in pattern)) is launch


def test_the_launches_kept_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from spt_kernels.kernels import prepared_launch

    monkeypatch.setattr(prepared_launch, "_MOST_LAUNCHES", 3)
    launches = PreparedLaunches()
    for n_rows in range(10):
        prepared(launches, tensor(), tensor(), n_rows=n_rows)
        assert len(launches._launches) <= 3
