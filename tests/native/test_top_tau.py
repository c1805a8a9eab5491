"""C++ top-tau against a ranking of all scores by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spt_kernels import native

LARGE = 400_000  # above the size from which a sample guesses a pivot


def ranked(tensors: list[Tensor], k: int, caps: list[int]) -> list[list[int]]:
    """The selection, by walking down the ranking of everything one score at a time."""
    scores = np.concatenate([t.double().numpy() for t in tensors])
    owner = np.concatenate([np.full(t.numel(), m) for m, t in enumerate(tensors)])
    position = np.concatenate([np.arange(t.numel()) for t in tensors])
    selected: list[list[int]] = [[] for _ in tensors]
    counted = 0
    for i in np.lexsort((position, owner, -scores)):
        if counted == k:
            break
        assert scores[i] > 0, "the test asks for more than there is"
        m = int(owner[i])
        counted += len(selected[m]) < caps[m]
        selected[m].append(int(position[i]))
    return [sorted(positions) for positions in selected]


def check(tensors: list[Tensor], k: int, caps: list[int] | None = None) -> None:
    caps = [t.numel() for t in tensors] if caps is None else caps
    found = native.top_tau(tensors, k, caps)
    assert all(p.dtype == torch.int64 for p in found)
    assert [p.tolist() for p in found] == ranked(tensors, k, caps)


def normal_scores(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).square()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize(
    "numels", [[1000], [1, 999, 0, 31, 32, 33], [LARGE, 17]], ids=["1x1000", "ragged", "large"]
)
def test_random_scores(code_path: str, numels: list[int], k: int, dtype: torch.dtype) -> None:
    check([normal_scores(n, seed).to(dtype) for seed, n in enumerate(numels)], k)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 1.0])
def test_shares_of_a_large_tensor(code_path: str, share: float) -> None:
    check([normal_scores(LARGE) + 1e-6], int(share * LARGE))


@pytest.mark.parametrize(
    "scores",
    [
        torch.full((LARGE,), 3.0),
        torch.arange(1, LARGE + 1, dtype=torch.float32),
        torch.arange(LARGE, 0, -1, dtype=torch.float32),
        torch.arange(1, LARGE + 1, dtype=torch.int32).view(torch.float32),
        torch.randint(1, 4, (LARGE,), generator=torch.Generator().manual_seed(0)).float(),
        torch.zeros(LARGE).index_fill_(0, torch.arange(0, LARGE, 100), 1.0),
        torch.full((LARGE,), -0.0).index_fill_(0, torch.arange(5, LARGE, 97), 2.0),
    ],
    ids=["all-equal", "ascending", "descending", "denormal", "three-values", "ones-in-zeros",
         "twos-in-minus-zeros"],
)  # fmt: skip
@pytest.mark.parametrize("k", [1, 3000])
def test_adversarial_scores(code_path: str, scores: Tensor, k: int) -> None:
    check([scores[: LARGE // 2], scores[LARGE // 2 :]], k)


def test_largest_finite_and_smallest_denormal(code_path: str) -> None:
    scores = torch.tensor([0.0, 3.4028235e38, 1e-45, -0.0, 1.0, 1e-45])
    check([scores], 3)
    check([scores], 4)


def test_ten_thousand_tiny_tensors() -> None:
    tensors = list(normal_scores(50_000).view(10_000, 5))
    check(tensors, 1234, [1 + m % 3 for m in range(10_000)])


@pytest.mark.parametrize("numel", [300, LARGE // 4])
@pytest.mark.parametrize("seed", range(4))
def test_caps(code_path: str, numel: int, seed: int) -> None:
    # the first tensors hold the largest scores, so that their caps bind; few values, so many ties
    random = np.random.default_rng(seed)
    tensors = [(normal_scores(numel, seed + m) * 4 ** (3 - m)).ceil() / 8 for m in range(4)]
    caps = [int(c) for c in random.integers(0, numel // 3, size=4)]
    for k in (1, sum(caps) // 2, sum(caps) - 1, sum(caps)):
        if k > 0:
            check(tensors, k, caps)


def test_nothing_is_selected_for_k_0() -> None:
    assert [p.tolist() for p in native.top_tau([normal_scores(10)], 0, [10])] == [[]]
    assert native.top_tau([], 0, []) == []


@pytest.mark.parametrize("numel", [100, LARGE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, -float("inf"), -1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_bad_score_is_named(code_path: str, numel: int, bad: float, dtype: torch.dtype) -> None:
    if bad == -1e-45 and dtype == torch.bfloat16:
        bad = -1e-40
    tensors = [normal_scores(numel), normal_scores(numel, 1).to(dtype)]
    tensors[1][57] = bad
    with pytest.raises(ValueError, match=r"tensors\[1\].* at flat position 57"):
        native.top_tau(tensors, 5, [numel, numel])


@pytest.mark.parametrize("numel", [100, LARGE])
def test_too_few_positive_scores_are_counted(code_path: str, numel: int) -> None:
    scores = torch.zeros(numel)
    scores[3:9] = 1.0
    with pytest.raises(ValueError, match="k is 7, but only 6 positive scores"):
        native.top_tau([scores], 7, [numel])
    with pytest.raises(ValueError, match="k is 4, but only 2 positive scores"):
        native.top_tau([scores, torch.zeros(5)], 4, [2, 5])


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_any_number_of_threads(restored_threads: None, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    check([normal_scores(LARGE).bfloat16(), normal_scores(LARGE, 1)], 5000)


def test_layout_and_dtype_are_checked() -> None:
    with pytest.raises(ValueError, match=r"tensors\[0\] must be a contiguous CPU tensor"):
        native.top_tau([torch.ones(4, 4).T], 1, [16])
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        native.top_tau([torch.ones(4, dtype=torch.float64)], 1, [4])
    with pytest.raises(ValueError, match="caps has 2 items, expected 1"):
        native.top_tau([torch.ones(4)], 1, [4, 4])
