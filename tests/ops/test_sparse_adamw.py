"""Sparse AdamW against `torch.optim.AdamW`, and its backends against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from spt_kernels import native
from spt_kernels.ops.sparse_adamw import AdamWEntry, sparse_adamw
from spt_kernels.reference import sparse_adamw as reference

# Backends differ from torch only in how products and sums are rounded or fused: three units in the
# last place of the largest term, which is of order one in these tests.
AGREEMENT = {"rtol": 4e-7, "atol": 4e-7}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

HYPER = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.05,
}


def make_entry(
    nnz: int, dtype: torch.dtype | None = torch.float32, *, seed: int = 0, numel: int = 0
) -> AdamWEntry:
    """An entry at its first step, with a target of `dtype` (or none) of about twice its values."""
    generator = torch.Generator().manual_seed(seed)
    entry = AdamWEntry(
        param=torch.randn(nnz, generator=generator),
        grad=torch.randn(nnz, generator=generator),
        exp_avg=torch.zeros(nnz),
        exp_avg_sq=torch.zeros(nnz),
        step=torch.tensor(1.0),
        **HYPER,
    )
    if dtype is None:
        return entry
    target = torch.randn(numel or 2 * nnz + 3, generator=generator).to(dtype)
    index = torch.randperm(target.numel(), generator=generator)[:nnz].sort().values.int()
    return replace(entry, target=target, index=index, original=target[index.long()].clone())


def dense_adamw(entry: AdamWEntry, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The same updates by torch's single-tensor AdamW in `dtype`: the parameter after them."""
    param = entry.param.to(dtype, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW(
        [param],
        lr=entry.lr,
        betas=(entry.beta1, entry.beta2),
        eps=entry.eps,
        weight_decay=entry.weight_decay,
        maximize=entry.maximize,
        foreach=False,
    )
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("nnz", [1, 5, 1025])
def test_follows_torch_adamw(nnz: int, dtype: torch.dtype | None, maximize: bool) -> None:
    entry = replace(make_entry(nnz, dtype), maximize=maximize)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(nnz, generator=generator) for _ in range(20)]
    expected = dense_adamw(entry, grads, torch.float32)
    untouched = None
    if entry.target is not None and entry.index is not None:
        untouched = entry.target.clone()

    for t, grad in enumerate(grads, start=1):
        sparse_adamw([replace(entry, grad=grad, step=torch.tensor(float(t)))])

    torch.testing.assert_close(entry.param, expected, rtol=2e-6, atol=1e-7)
    if entry.target is not None and entry.index is not None and entry.original is not None:
        assert untouched is not None
        written = entry.target[entry.index.long()]
        assert torch.equal(written, (entry.original.float() + entry.param).to(entry.target.dtype))
        untouched[entry.index.long()] = written
        assert torch.equal(entry.target, untouched), "a position outside the index was written"


def test_one_step_agrees_to_the_last_places() -> None:
    entry = make_entry(4096, None)
    expected = dense_adamw(entry, [entry.grad], torch.float32)
    sparse_adamw([entry])
    torch.testing.assert_close(entry.param, expected, **AGREEMENT)


def test_many_entries_are_each_their_own() -> None:
    kinds = [torch.float32, None, torch.bfloat16, torch.float16]
    sizes = [0, 1, 7, 1024, 1025, 33]
    together = [make_entry(n, kinds[i % 4], seed=i) for i, n in enumerate(sizes)]
    alone = [make_entry(n, kinds[i % 4], seed=i) for i, n in enumerate(sizes)]
    together[3] = replace(together[3], lr=0.5, step=torch.tensor(7.0), maximize=True)
    alone[3] = replace(alone[3], lr=0.5, step=torch.tensor(7.0), maximize=True)

    sparse_adamw(together)
    for entry in alone:
        sparse_adamw([entry])

    for one, other in zip(together, alone, strict=True):
        for part in ("param", "exp_avg", "exp_avg_sq", "target"):
            if getattr(one, part) is not None:
                assert torch.equal(getattr(one, part), getattr(other, part)), part


def test_matrix_without_target_keeps_its_shape() -> None:
    entry = make_entry(12, None)
    parts = {part: getattr(entry, part).view(3, 4) for part in ("param", "grad")}
    zeros = {part: torch.zeros(3, 4) for part in ("exp_avg", "exp_avg_sq")}
    expected = dense_adamw(entry, [entry.grad], torch.float32)
    sparse_adamw([replace(entry, **parts, **zeros)])
    torch.testing.assert_close(entry.param, expected, **AGREEMENT)


def test_step_zero_changes_nothing() -> None:
    skipped, taken = make_entry(9, torch.bfloat16), make_entry(9, None, seed=1)
    skipped = replace(skipped, step=torch.tensor(0.0), grad=torch.full((9,), math.nan))
    assert skipped.target is not None
    before = [t.clone() for t in (skipped.param, skipped.exp_avg, skipped.target)]
    param = taken.param.clone()
    sparse_adamw([skipped, taken])
    for was, now in zip(before, (skipped.param, skipped.exp_avg, skipped.target), strict=True):
        assert torch.equal(was, now)
    assert not torch.equal(taken.param, param)


def test_versions_are_bumped() -> None:
    entry = make_entry(3)
    parts = [entry.param, entry.exp_avg, entry.exp_avg_sq, entry.target]
    versions = [part._version for part in parts if part is not None]
    sparse_adamw([entry])
    for part, version in zip(parts, versions, strict=True):
        assert part is not None
        assert part._version > version


def test_poisoned_rest_of_the_target_is_never_read() -> None:
    entry = make_entry(100)
    assert entry.target is not None
    assert entry.index is not None
    entry.target.fill_(math.nan)
    sparse_adamw([entry])
    assert entry.target[entry.index.long()].isfinite().all()
    assert int(entry.target.isnan().sum()) == entry.target.numel() - 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_same_bits_with_one_thread(dtype: torch.dtype) -> None:
    first, second = make_entry(70_001, dtype), make_entry(70_001, dtype)
    sparse_adamw([first], stochastic_rounding=True, seed=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sparse_adamw([second], stochastic_rounding=True, seed=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.param, second.param)
    assert first.target is not None
    assert second.target is not None
    assert torch.equal(first.target, second.target)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_native_agrees_with_the_reference(dtype: torch.dtype, stochastic: bool) -> None:
    if not native.available():
        pytest.skip(native.why_unavailable())
    ours, spec = make_entry(10_007, dtype), make_entry(10_007, dtype)
    for step in range(1, 6):
        row = [*HYPER.values(), step, 0.0, 4.0]
        for backend, entry in ((native, ours), (reference, spec)):
            backend.sparse_adamw(
                *([getattr(entry, part)] for part in PARTS),
                torch.tensor([row], dtype=torch.float64),
                stochastic,
                11,
            )
    torch.testing.assert_close(ours.param, spec.param, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(ours.exp_avg_sq, spec.exp_avg_sq, **AGREEMENT)
    assert ours.target is not None
    assert spec.target is not None
    # the random bits are the same; a sum that differs in its last place falls the other way rarely
    differing = (ours.target != spec.target).float().mean()
    assert differing < (0.5 if dtype == torch.float32 else 1e-2)
    gap = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.target, spec.target, rtol=gap, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [False, True], ids=["steps-on-cpu", "steps-on-device"])
@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_cuda_agrees_with_the_reference(lr: float, on_device: bool) -> None:
    kinds = [torch.float32, None, torch.bfloat16, torch.float16]
    spec = [replace(make_entry(1 + 999 * i, kinds[i % 4], seed=i), lr=lr) for i in range(6)]
    ours = [on_cuda(entry, on_device) for entry in spec]
    sparse_adamw(ours, stochastic_rounding=True, seed=8)
    sparse_adamw(spec, stochastic_rounding=True, seed=8)
    for found, expected in zip(ours, spec, strict=True):
        torch.testing.assert_close(found.param.cpu(), expected.param, **AGREEMENT)
        if found.target is not None and lr == 0:
            assert torch.equal(found.target.cpu(), expected.target), "other random bits"


def on_cuda(entry: AdamWEntry, step_too: bool) -> AdamWEntry:
    tensors = {part: getattr(entry, part) for part in (*PARTS, *(["step"] if step_too else []))}
    return replace(entry, **{part: t.cuda() for part, t in tensors.items() if t is not None})


PARTS = ("param", "grad", "exp_avg", "exp_avg_sq", "target", "index", "original")


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_opcheck(stochastic: bool) -> None:
    with_target, without = make_entry(5, torch.bfloat16), make_entry(3, None, seed=1)
    empty, no_index = torch.empty(0), torch.empty(0, dtype=torch.int32)
    without = replace(without, target=empty, index=no_index, original=empty.clone())
    lists = [[getattr(e, part) for e in (with_target, without)] for part in PARTS]
    hyper = torch.tensor([[*HYPER.values(), 1, 0, n] for n in range(2)], dtype=torch.float64)
    opcheck(torch.ops.spt.sparse_adamw.default, (*lists, hyper, stochastic, 1))


def test_no_entries() -> None:
    sparse_adamw([])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"param": torch.zeros(4, dtype=torch.float64)}, TypeError, r"entries\[0\].param must be"),
        ({"grad": torch.zeros(5)}, ValueError, r"grad must be of shape \(4,\)"),
        ({"exp_avg": torch.zeros(8)[::2]}, ValueError, "exp_avg must be dense and contiguous"),
        ({"step": torch.zeros(1)}, ValueError, "step must be a scalar"),
        ({"index": None}, ValueError, "all of target, index and original, or none"),
        ({"index": torch.arange(4)}, TypeError, "must be torch.int32"),
        ({"index": torch.arange(3, dtype=torch.int32)}, ValueError, "shape of its index"),
        ({"original": torch.zeros(4, dtype=torch.float16)}, TypeError, "must be torch.float32"),
        ({"target": torch.zeros(4, 4).t()}, ValueError, "must be contiguous"),
        ({"target": torch.zeros(16, dtype=torch.int32)}, TypeError, "float32, bfloat16 or"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_entries_are_refused(
    change: dict[str, Tensor | None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparse_adamw([replace(make_entry(4), **change)])
