"""The kernel of `sparse_adamw`, interpreted, against torch and the reference's random bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import sparse_adamw as kernels
from spt_kernels.ops.sparse_adamw import AdamWEntry
from spt_kernels.reference import sparse_adamw as reference

from ...ops.test_sparse_adamw import AGREEMENT, HYPER, PARTS, dense_adamw, make_entry
from .test_write_delta import assert_written

KINDS = [torch.float32, None, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 32)


def columns_of(entries: list[AdamWEntry]) -> list[list[Tensor]]:
    absent = {"target": torch.empty(0), "index": torch.empty(0, dtype=torch.int32)}
    absent["original"] = absent["target"]
    return [
        [part if (part := getattr(e, name)) is not None else absent[name] for e in entries]
        for name in PARTS
    ]


def hyper_of(n: int, *, step: float = 1, maximize: float = 0, **changed: float) -> Tensor:
    row = [*(HYPER | changed).values(), step, maximize]
    return torch.tensor([[*row, entry_id] for entry_id in range(n)], dtype=torch.float64)


@pytest.mark.parametrize("maximize", [0, 1], ids=["minimize", "maximize"])
@pytest.mark.parametrize("sizes", [[1], [31, 32, 33, 0, 65, 7]], ids=["one", "many"])
def test_follows_torch_adamw(sizes: list[int], maximize: int) -> None:
    entries = [make_entry(n, KINDS[i % 4], seed=i) for i, n in enumerate(sizes)]
    generator = torch.Generator().manual_seed(1)
    grads = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(5)]
    sign = -1 if maximize else 1
    expected = [
        dense_adamw(entry, [sign * step[i] for step in grads], torch.float32)
        for i, entry in enumerate(entries)
    ]
    columns = columns_of(entries)

    for t, step in enumerate(grads, start=1):
        for entry, grad in zip(entries, step, strict=True):
            entry.grad.copy_(grad)
        hyper = hyper_of(len(sizes), step=t, maximize=maximize)
        kernels.sparse_adamw(*columns, hyper, False, 0)

    for entry, param in zip(entries, expected, strict=True):
        torch.testing.assert_close(entry.param, param, rtol=2e-6, atol=1e-7)
        if entry.target is not None and entry.index is not None and entry.original is not None:
            summed = (entry.original.float() + entry.param).to(entry.target.dtype)
            assert_written(entry.target[entry.index.long()], summed)


@pytest.mark.parametrize("beta1", [0.0, 0.4, 0.9])
def test_one_step_agrees_to_the_last_places(beta1: float) -> None:
    ours, spec = make_entry(100, None), make_entry(100, None)
    for entry in (ours, spec):
        entry.exp_avg.copy_(torch.linspace(-3, 3, 100))
        entry.exp_avg_sq.copy_(torch.linspace(0, 3, 100))
    hyper = hyper_of(1, step=3, beta1=beta1)
    kernels.sparse_adamw(*columns_of([ours]), hyper, False, 0)
    reference.sparse_adamw(*columns_of([spec]), hyper, False, 0)
    for part in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(ours, part), getattr(spec, part), **AGREEMENT)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_random_bits_are_those_of_the_reference(dtype: torch.dtype | None) -> None:
    # lr = 0 leaves the sums alone, so that equal bits round them equally
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(130, generator=generator) * torch.logspace(-9, 6, 130)
    values[:6] = torch.tensor([math.inf, -math.inf, math.nan, 65510.0, 65519.0, -1e-7])
    found = []
    for backend in (kernels, reference):
        entry = make_entry(130, dtype)
        entry.param.copy_(values)
        hyper = hyper_of(1, step=12, lr=0.0)
        hyper[0, 7] = 41
        backend.sparse_adamw(*columns_of([entry]), hyper, True, 2**32 - 3)
        found.append(entry.param if entry.target is None else entry.target)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_step_zero_changes_nothing() -> None:
    entries = [make_entry(40, torch.bfloat16), make_entry(40, torch.float32, seed=1)]
    entries[0].grad.fill_(math.nan)
    before = [part.clone() for part in (entries[0].param, entries[0].exp_avg, entries[0].target)]
    other = entries[1].param.clone()
    hyper = hyper_of(2)
    hyper[0, 5] = 0
    kernels.sparse_adamw(*columns_of(entries), hyper, False, 0)
    after = (entries[0].param, entries[0].exp_avg, entries[0].target)
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now)
    assert not torch.equal(entries[1].param, other)


def test_poisoned_rest_of_the_target_is_never_read() -> None:
    entry = make_entry(70)
    assert entry.target is not None
    entry.target.fill_(math.nan)
    kernels.sparse_adamw(*columns_of([entry]), hyper_of(1), False, 0)
    assert int(entry.target.isnan().sum()) == entry.target.numel() - 70


def test_at_the_shipped_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    entries = [make_entry(n, torch.float32, seed=n) for n in (kernels.BLOCK + 1, 3)]
    expected = [dense_adamw(entry, [entry.grad], torch.float32) for entry in entries]
    kernels.sparse_adamw(*columns_of(entries), hyper_of(2), False, 0)
    for entry, param in zip(entries, expected, strict=True):
        torch.testing.assert_close(entry.param, param, **AGREEMENT)


def test_no_entries() -> None:
    kernels.sparse_adamw(*columns_of([]), hyper_of(0).view(0, 8), False, 0)
