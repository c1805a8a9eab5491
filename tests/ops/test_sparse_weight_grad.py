"""`ops.sparse_weight_grad` against the dense gradient in float64, sampled."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spt_kernels import native
from spt_kernels.ops.sparse_weight_grad import SparsePattern, launch, sparse_weight_grad
from spt_kernels.reference import sparse_weight_grad as reference

from ..tolerance import assert_within_budget

# `ops` has a function of that name too
op = importlib.import_module("spt_kernels.ops.sparse_weight_grad")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def positions(n: int, numel: int, device: str) -> Tensor:
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(7))
    return order[:n].sort().values.int().to(device)


def check(found: Tensor, grad_output: Tensor, x: Tensor, index: Tensor) -> None:
    grad_output, x = grad_output.flatten(0, -2), x.flatten(0, -2)
    truth = (grad_output.double().T @ x.double()).flatten()[index.long()]
    plain = (grad_output.T @ x).flatten()[index.long()]
    assert found.dtype == torch.float32
    assert_within_budget(found, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "n_out", "n_in", "nnz"),
    [
        (1, 1, 1, 1),
        (5, 8, 7, 0),
        (0, 8, 7, 3),
        (129, 65, 33, 40),
        (70, 33, 130, 2000),
        (9, 16, 32, 512),
    ],
    ids=["one-element", "no-entry", "no-token", "sparse", "half", "every-entry"],
)
@pytest.mark.parametrize("as_pattern", [False, True], ids=["index", "pattern"])
def test_entries(
    tokens: int, n_out: int, n_in: int, nnz: int, dtype: torch.dtype, as_pattern: bool, device: str
) -> None:
    grad_output = noise(tokens, n_out, seed=0, dtype=dtype, device=device)
    x = noise(tokens, n_in, seed=1, dtype=dtype, device=device)
    index = positions(nnz, n_out * n_in, device)
    wanted = SparsePattern.build(index, n_out, n_in) if as_pattern else index
    check(sparse_weight_grad(grad_output, x, wanted), grad_output, x, index)


@pytest.mark.skipif(not native.available(), reason="the reference has one way only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("tokens", "n_out", "n_in"),
    [(2100, 40, 30), (64, 90, 33), (64, 33, 90)],
    ids=["one-block", "blocks-of-rows", "blocks-of-columns"],
)
def test_blocks_of_the_dense_product(
    tokens: int,
    n_out: int,
    n_in: int,
    density: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a CPU does with a dense pattern, with a row and a column that have no entry."""
    monkeypatch.setattr(op, "_dense_is_cheaper", lambda *_: True)
    monkeypatch.setattr(op, "_BLOCK_NUMEL", 1000)
    grad_output = noise(tokens, n_out, seed=0, dtype=dtype, device="cpu")
    x = noise(tokens, n_in, seed=1, dtype=dtype, device="cpu")
    wanted = torch.rand(n_out, n_in, generator=torch.Generator().manual_seed(2)) < density
    if density < 1:
        wanted[5] = wanted[:, 7] = False
        wanted[11] = True
    index = wanted.flatten().nonzero().flatten().int()
    pattern = SparsePattern.build(index, n_out, n_in)
    assert pattern._block == len(pattern.rows) * len(pattern.columns)
    found = sparse_weight_grad(grad_output, x, pattern)
    # 16-bit numbers multiply exactly in fp32, so the fp32 product is what to compare with
    check(found, grad_output.float(), x.float(), index)
    assert torch.equal(sparse_weight_grad(grad_output, x, index), found)


@pytest.mark.skipif(not native.available(), reason="the reference has one way only")
def test_a_dense_index_in_any_order_and_with_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_dense_is_cheaper", lambda *_: True)
    grad_output = noise(20, 30, seed=0, dtype=torch.float32, device="cpu")
    x = noise(20, 40, seed=1, dtype=torch.float32, device="cpu")
    for n_repeated in (300, 400):  # with 300 there are as many entries as the gradient has
        index = torch.cat([positions(900, 1200, "cpu"), positions(n_repeated, 1200, "cpu")])
        check(sparse_weight_grad(grad_output, x, index), grad_output, x, index)
        index = index.sort().values
        check(sparse_weight_grad(grad_output, x, index), grad_output, x, index)


@pytest.mark.skipif(not native.available(), reason="the reference has one way only")
@pytest.mark.parametrize(
    ("share", "dense"),
    [(0.02, False), (0.15, False), (0.8, False), (0.8, True)],
    ids=["sparse", "tiles", "every-tile", "dense"],
)
def test_the_same_bits_every_run_and_for_any_number_of_threads_of_ones_own(
    share: float, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_dense_is_cheaper", lambda *_: dense)
    grad_output = noise(1576, 96, seed=0, dtype=torch.float32, device="cpu")
    x = noise(1576, 160, seed=1, dtype=torch.float32, device="cpu")
    pattern = SparsePattern.build(positions(int(share * 96 * 160), 96 * 160, "cpu"), 96, 160)
    before = torch.get_num_threads()
    found = {}
    for n_threads in (1, 2, 3, 4):
        torch.set_num_threads(n_threads)
        runs = [sparse_weight_grad(grad_output, x, pattern) for _ in range(2)]
        assert torch.equal(*runs)
        found[n_threads] = runs[0]
    torch.set_num_threads(before)
    # the library of the dense product may divide its sums among threads
    assert dense or all(torch.equal(other, found[1]) for other in found.values())


def test_a_cpu_takes_the_way_that_costs_less() -> None:
    def dense(nnz: float, n_cells: float, tokens: int, n_out: int, n_in: int) -> bool:
        return op._dense_is_cheaper(int(nnz), int(n_cells), tokens, n_out, n_in)

    numel = 3072 * 768
    for tokens in (197, 1576, 12608):
        assert not dense(0.05 * numel, numel, tokens, 3072, 768)
        assert dense(0.5 * numel, numel, tokens, 3072, 768)
    # half of the rows and all that is in them: tiles have half as many cells
    assert not dense(0.5 * numel, 0.5 * numel, 12608, 3072, 768)
    # so few multiplications are done before the dense product has begun
    assert not dense(100, 100, 4, 10, 10)


def test_a_pattern_is_moved_copied_and_pickled_with_its_plan() -> None:
    pattern = SparsePattern.build(positions(60, 96, "cpu"), 8, 12)
    assert len(pattern._plan) == 1
    grad_output = noise(9, 8, seed=0, dtype=torch.float32, device="cpu")
    x = noise(9, 12, seed=1, dtype=torch.float32, device="cpu")
    found = sparse_weight_grad(grad_output, x, pattern)
    for other in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert torch.equal(sparse_weight_grad(grad_output, x, other), found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
def test_entries_of_a_vit_on_a_card(dtype: torch.dtype, share: float) -> None:
    grad_output = noise(12608, 3072, seed=0, dtype=dtype, device="cuda")
    x = noise(12608, 768, seed=1, dtype=dtype, device="cuda")
    index = positions(int(share * 3072 * 768), 3072 * 768, "cuda")
    pattern = SparsePattern.build(index, 3072, 768)
    check(sparse_weight_grad(grad_output, x, pattern), grad_output, x, index)


def test_leading_dimensions_views_and_entries_of_a_fused_slice(device: str) -> None:
    grad_output = noise(3, 20, 48, seed=0, dtype=torch.float32, device=device)[:, :, 16:32]
    x = noise(3, 24, 20, seed=1, dtype=torch.float32, device=device).transpose(1, 2)
    index = positions(30, 16 * 24, device)
    check(sparse_weight_grad(grad_output, x, index), grad_output, x, index)
    vector = noise(24, seed=2, dtype=torch.float32, device=device)
    found = sparse_weight_grad(grad_output[0, 0], vector, index)
    torch.testing.assert_close(found, torch.outer(grad_output[0, 0], vector).flatten()[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_of_the_columns_that_occur(dtype: torch.dtype, device: str) -> None:
    grad_output = noise(2, 30, 12, seed=0, dtype=dtype, device=device)
    x = noise(2, 30, 50, seed=1, dtype=dtype, device=device)
    index = positions(25, 12 * 50, device)
    pattern = SparsePattern.build(index, 12, 50)
    assert torch.equal(pattern.columns, torch.unique(index % 50))
    assert torch.equal(pattern.rows, torch.unique(index // 50))
    kept = x[..., pattern.columns]

    check(sparse_weight_grad(grad_output, kept, pattern.compacted()), grad_output, x, index)
    assert pattern.compacted().compacted().in_features == len(pattern.columns)


def test_one_column(device: str) -> None:
    index = torch.tensor([3, 8, 13], dtype=torch.int32, device=device)
    pattern = SparsePattern.build(index, 4, 5).compacted()
    grad_output = torch.arange(8.0, device=device).view(2, 4)
    x = torch.tensor([[2.0], [3.0]], device=device)
    assert sparse_weight_grad(grad_output, x, pattern).tolist() == [12.0, 17.0, 22.0]


def test_the_same_bits_every_run(device: str) -> None:
    grad_output = noise(600, 64, seed=0, dtype=torch.bfloat16, device=device)
    x = noise(600, 128, seed=1, dtype=torch.bfloat16, device=device)
    pattern = SparsePattern.build(positions(900, 64 * 128, device), 64, 128)
    found = [sparse_weight_grad(grad_output, x, pattern) for _ in range(3)]
    assert all(torch.equal(other, found[0]) for other in found)


def test_the_reference_works_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_NUMEL", 64)
    monkeypatch.setattr(reference, "_BLOCK_TOKENS", 7)
    grad_output = noise(30, 20, seed=0, dtype=torch.float32, device="cpu")
    x = noise(30, 40, seed=1, dtype=torch.float32, device="cpu")
    index = positions(100, 800, "cpu")
    check(reference.sparse_weight_grad(grad_output, x, index), grad_output, x, index)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(where: str) -> None:
    grad_output = noise(12, 8, seed=0, dtype=torch.bfloat16, device=where)
    x = noise(12, 16, seed=1, dtype=torch.bfloat16, device=where)
    pattern = SparsePattern.build(positions(9, 128, where), 8, 16)
    op = torch.ops.spt.sparse_weight_grad.default
    torch.library.opcheck(op, (grad_output, x, pattern.index, (), 0))
    torch.library.opcheck(op, (grad_output[:, ::2], x, pattern.index[:3], [], 0))
    torch.library.opcheck(op, (grad_output, x, pattern.index, pattern._plan, pattern._block))
    dense = SparsePattern.build(positions(100, 128, where), 8, 16)
    torch.library.opcheck(op, (grad_output, x, dense.index, dense._plan, dense._block))


INDEX = torch.tensor([0, 5, 11], dtype=torch.int32)


def test_a_pattern_of_an_index_with_gaps_in_memory() -> None:
    index = torch.arange(0, 480, 7, dtype=torch.int32)[::2]
    grad_output, x = torch.randn(5, 20), torch.randn(5, 24)
    pattern = SparsePattern.build(index, 20, 24)
    expected = (grad_output.t() @ x).flatten()[index.long()]
    torch.testing.assert_close(launch(grad_output, x, pattern), expected)


def test_no_tokens_of_a_view_give_zeros() -> None:
    grad_output, x = torch.zeros(0, 6)[:, ::2], torch.zeros(0, 8)[:, ::2]
    index = torch.tensor([0, 5], dtype=torch.int32)
    assert sparse_weight_grad(grad_output, x, index).tolist() == [0.0, 0.0]


GOOD = {"grad_output": torch.zeros(2, 3), "input": torch.zeros(2, 4), "index": INDEX}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_output": torch.zeros(2, 3).double()}, TypeError, "grad_output: expected fp32"),
        ({"input": torch.zeros(2, 4).half()}, TypeError, "input: expected torch.float32"),
        ({"input": torch.zeros(3, 4)}, ValueError, "input: expected the leading dimensions"),
        ({"index": INDEX.long()}, TypeError, "index: expected torch.int32, got torch.int64"),
        ({"index": INDEX.view(1, 3)}, ValueError, r"index: expected shape \[nnz\]"),
        ({"index": INDEX - 1}, ValueError, "expected positions in the 3×4 gradient, got -1"),
        ({"index": INDEX + 1}, ValueError, "expected positions in the 3×4 gradient, got 12"),
        ({"index": SparsePattern.build(INDEX, 6, 2)}, ValueError, "grad_output: expected 6 feat"),
        ({"index": SparsePattern.build(INDEX, 3, 5)}, ValueError, "input: expected 5 features"),
        ({"index": INDEX.to("meta")}, ValueError, "expected one device"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    call: Callable[..., Tensor] = sparse_weight_grad
    with pytest.raises(error, match=message):
        call(**(GOOD | change))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0.5]), TypeError, "index: expected int32 or int64, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int32), ValueError, "index: expected shape"),
        (torch.tensor([3, 3]), ValueError, "without repetition"),
        (torch.tensor([4, 3]), ValueError, "ascending"),
        (torch.tensor([-1, 3]), ValueError, r"in \[0, 12\)"),
        (torch.tensor([3, 12]), ValueError, r"in \[0, 12\)"),
    ],
)
def test_a_pattern_refuses(index: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparsePattern.build(index, 3, 4)


def test_a_pattern_refuses_a_weight_beyond_int32() -> None:
    with pytest.raises(ValueError, match="fewer than 2³¹"):
        SparsePattern.build(INDEX, 2**16, 2**15)
