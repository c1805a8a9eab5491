"""The kernels of `top_tau`, interpreted, against a brute-force ranking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import top_tau as kernels

from ...ops.test_top_tau import brute_force, selections


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for a dozen scores, so that order and ties cross their borders."""
    monkeypatch.setattr(kernels, "_TILE", 4)
    monkeypatch.setattr(kernels, "_TILES", 2)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(selections())
def test_is_the_shortest_prefix_of_the_ranking(
    case: tuple[list[Tensor], int, list[int] | None],
) -> None:
    tensors, k, caps = case
    reach = [tensor.numel() for tensor in tensors] if caps is None else caps
    found = kernels.top_tau(tensors, k, reach)
    assert [chosen.tolist() for chosen in found] == brute_force(tensors, k, caps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_shipped_tile_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    block = kernels._TILE * kernels._TILES
    scores = [torch.rand(n, generator=generator).to(dtype) for n in (block + 1, 1, 300)]
    scores[2] = (scores[2] * 4).floor() / 4  # ties with each other

    found = kernels.top_tau(scores, 20_000, [block + 1, 1, 300])

    flat = torch.cat(scores).float()
    _, order = flat.sort(descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order[:20_000], True)
    for positions, own in zip(found, chosen.split([block + 1, 1, 300]), strict=True):
        assert torch.equal(positions, own.nonzero().squeeze(1))


@pytest.mark.parametrize(
    "scores",
    [
        torch.full((12,), 3.0),
        torch.arange(1, 13, dtype=torch.int32).view(torch.float32),
        torch.tensor([2.0] + [1.0] * 11),
        torch.tensor([1e-38] * 8 + [3e38] + [1e-38] * 3),
    ],
    ids=["all-equal", "denormal", "one-above-ties", "outlier"],
)
def test_adversarial_scores(scores: Tensor) -> None:
    tensors, caps = list(scores.tensor_split([7, 8])), [4, 1, 100]
    found = kernels.top_tau(tensors, 7, caps)
    assert [chosen.tolist() for chosen in found] == brute_force(tensors, 7, caps)


def test_same_bits_every_run() -> None:
    scores = [torch.arange(50.0).remainder(7), torch.arange(31.0).remainder(5)]
    first, second = (kernels.top_tau(scores, 40, [50, 31]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_bad_scores_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        kernels.top_tau([torch.ones(9), torch.tensor([1.0, value])], 1, [9, 2])


def test_zeros_of_both_signs_are_never_selected() -> None:
    scores = [torch.tensor([0.0, -0.0, 1e-45, 2.0])]
    assert kernels.top_tau(scores, 2, [4])[0].tolist() == [2, 3]
    with pytest.raises(ValueError, match="k is 3, but only 2 positive"):
        kernels.top_tau(scores, 3, [4])


def test_nothing_to_select() -> None:
    found = kernels.top_tau([torch.empty(0), torch.zeros(3)], 0, [0, 3])
    assert [chosen.tolist() for chosen in found] == [[], []]
