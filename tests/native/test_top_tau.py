"""C++ top-tau against a ranking of all scores by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spt_kernels import native

LARGE = 400_000  # above the size from which a sample guesses a pivot


def ranking(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """All scores from the highest down, ties in order: where they lie in all tensors, one after
    another, and in the ranking of their owner's."""
    scores = np.concatenate([t.double().numpy() for t in tensors])
    assert not np.isnan(scores).any()
    owner = np.repeat(np.arange(len(tensors)), [t.numel() for t in tensors])
    order = np.argsort(-scores, kind="stable")  # scores lie by owner, then by position
    place = np.empty(len(order), dtype=np.int64)
    by_owner = np.argsort(owner[order], kind="stable")
    place[by_owner] = np.concatenate([np.arange(t.numel()) for t in tensors])
    return order, place


def check(tensors: list[Tensor], *ks: int, caps: list[int] | None = None) -> None:
    """Of each owner no more than its cap count, and all are selected until k have counted."""
    numels = [t.numel() for t in tensors]
    caps = numels if caps is None else caps
    order, place = ranking(tensors)
    counted = np.cumsum(place < np.repeat(caps, numels)[order])
    n_positive = sum(int((t > 0).sum()) for t in tensors)
    starts = np.cumsum([0, *numels])
    for k in ks:
        n_selected = int(np.searchsorted(counted, k)) + 1
        assert n_selected <= n_positive, "the test asks for more than there is"
        found = native.top_tau(tensors, k, caps)
        assert all(p.dtype == torch.int64 for p in found)
        assert all(((p >= 0) & (p < n)).all() for p, n in zip(found, numels, strict=True))
        is_selected = np.zeros(len(order), dtype=bool)
        is_selected[order[:n_selected]] = True
        lie = [start + p.numpy() for start, p in zip(starts[:-1], found, strict=True)]
        assert np.array_equal(np.concatenate(lie), np.flatnonzero(is_selected))


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


def adversaries() -> dict[str, Tensor]:
    """Scores that mislead a sample, tie at every cut, or span all that a float can hold."""
    generator = torch.Generator().manual_seed(0)

    def rand() -> Tensor:
        return torch.rand(LARGE, generator=generator)

    few = torch.arange(0, LARGE, 100)
    return {
        "all-equal": torch.full((LARGE,), 3.0),
        "ascending": torch.arange(1, LARGE + 1, dtype=torch.float32),
        "descending": torch.arange(LARGE, 0, -1, dtype=torch.float32),
        "denormal": torch.arange(1, LARGE + 1, dtype=torch.int32).view(torch.float32),
        "one-denormal": torch.full((LARGE,), 1e-40),
        "two-values": (rand() < 0.3).float() + 1,
        "three-values": torch.randint(1, 4, (LARGE,), generator=generator).float(),
        "ties-under-a-few": torch.where(rand() < 0.005, 2 + rand(), torch.tensor(1.0)),
        "ties-over-a-few": torch.where(rand() < 0.9, torch.tensor(1.0), rand()),
        "ones-in-zeros": torch.zeros(LARGE).index_fill_(0, few, 1.0),
        "twos-in-minus-zeros": torch.full((LARGE,), -0.0).index_fill_(0, few + 5, 2.0),
        "log-uniform": 10 ** (60 * rand() - 30),
        "powers-of-two": torch.ldexp(torch.ones(LARGE), (120 * rand() - 60).int()),
        "outliers": (1e-20 * rand()).index_fill_(0, torch.arange(7, LARGE, 90_001), 3e38),
        "one-large-column": rand().view(-1, 64).index_fill_(1, torch.tensor([5]), 9.0).view(-1),
        "a-large-end": torch.cat([rand()[3000:], 1e6 + rand()[:3000]]),
    }


ADVERSARIES = adversaries()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("n_tensors", [1, 3], ids=["1-tensor", "3-tensors"])
def test_adversarial_scores(code_path: str, n_tensors: int, name: str, dtype: torch.dtype) -> None:
    tensors = list(ADVERSARIES[name].to(dtype).tensor_split(n_tensors))
    n_positive = sum(int((t > 0).sum()) for t in tensors)
    # the last two are read twice: first counted, then written
    check(tensors, 1, 3000, n_positive // 2, n_positive)
    with pytest.raises(ValueError, match=f"only {n_positive} positive scores"):
        native.top_tau(tensors, n_positive + 1, [t.numel() for t in tensors])


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_scores_with_caps(name: str) -> None:
    tensors = list(ADVERSARIES[name].tensor_split([1000, 150_000, 150_001]))
    caps = [900, 2500, 0, 100_000]
    most = sum(min(int((t > 0).sum()), cap) for t, cap in zip(tensors, caps, strict=True))
    check(tensors, 1, 2000, most // 2, most, caps=caps)


def test_caps_that_mislead_a_sample() -> None:
    # three scores of each tensor count, and most tensors have none in the sample
    tensors = list(normal_scores(LARGE).view(8000, 50))
    check(tensors, 23_000, caps=[3] * 8000)
    assert passes(tensors, 23_000, [3] * 8000) > 3  # what this test is about


@pytest.mark.parametrize("name", ADVERSARIES)
def test_at_most_two_passes_whatever_the_scores(name: str) -> None:
    tensors = list(ADVERSARIES[name].tensor_split(3))
    whole = [t.numel() for t in tensors]
    n_positive = sum(int((t > 0).sum()) for t in tensors)
    sample = 0.07  # of every 256 scores one, which costs a cache line
    for k in (1, 3000):
        assert passes(tensors, k, whole) <= 2 + sample
    for k in (n_positive // 2, n_positive):
        assert passes(tensors, k, whole) <= 3 + sample


def passes(tensors: list[Tensor], k: int, caps: list[int]) -> float:
    return native.top_tau_bytes_read(tensors, k, caps) / sum(t.nbytes for t in tensors)


def test_largest_finite_and_smallest_denormal(code_path: str) -> None:
    scores = torch.tensor([0.0, 3.4028235e38, 1e-45, -0.0, 1.0, 1e-45])
    check([scores], 3, 4)


def test_ten_thousand_tiny_tensors() -> None:
    tensors = list(normal_scores(50_000).view(10_000, 5))
    check(tensors, 1234, caps=[1 + m % 3 for m in range(10_000)])


@pytest.mark.parametrize("numel", [300, LARGE // 4])
@pytest.mark.parametrize("seed", range(4))
def test_caps(code_path: str, numel: int, seed: int) -> None:
    # the first tensors hold the largest scores, so that their caps bind; few values, so many ties
    random = np.random.default_rng(seed)
    tensors = [(normal_scores(numel, seed + m) * 4 ** (3 - m)).ceil() / 8 for m in range(4)]
    caps = [int(c) for c in random.integers(0, numel // 3, size=4)]
    ks = {1, sum(caps) // 2, sum(caps) - 1, sum(caps)} - {0}
    check(tensors, *sorted(ks), caps=caps)


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


@pytest.mark.parametrize("k", [5000, LARGE])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
def test_any_number_of_threads(restored_threads: None, n_threads: int, k: int) -> None:
    torch.set_num_threads(n_threads)
    tied = (normal_scores(LARGE, 1) * 4).ceil()  # across whatever the threads split at
    tensors = [normal_scores(LARGE).bfloat16(), tied, *normal_scores(3000, 2).view(100, 30)]
    check(tensors, k, caps=[LARGE // 2, *[t.numel() for t in tensors[1:]]])


def test_same_positions_every_run() -> None:
    tensors = [normal_scores(LARGE).mul(50).floor(), normal_scores(LARGE, 1)]
    first = native.top_tau(tensors, 4321, [LARGE, LARGE])
    for _ in range(20):
        again = native.top_tau(tensors, 4321, [LARGE, LARGE])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_layout_and_dtype_are_checked() -> None:
    with pytest.raises(ValueError, match=r"tensors\[0\] must be a contiguous CPU tensor"):
        native.top_tau([torch.ones(4, 4).T], 1, [16])
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        native.top_tau([torch.ones(4, dtype=torch.float64)], 1, [4])
    with pytest.raises(ValueError, match="caps has 2 items, expected 1"):
        native.top_tau([torch.ones(4)], 1, [4, 4])
