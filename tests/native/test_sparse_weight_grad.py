"""C++ sparse weight gradient against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_kernels import native
from tests.tolerance import assert_within_budget

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def operands(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens + out_features)
    grad_output = torch.randn(tokens, out_features, generator=random).to(dtype)
    return grad_output, torch.randn(tokens, in_features, generator=random).to(dtype)


def uniform_index(out_features: int, in_features: int, density: float, seed: int = 0) -> Tensor:
    numel = out_features * in_features
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    return order[: round(density * numel)].sort().values.int()


def check(grad_output: Tensor, x: Tensor, index: Tensor, actual: Tensor | None = None) -> None:
    if actual is None:
        actual = native.sparse_weight_grad(grad_output, x, index)
    assert actual.dtype == torch.float32
    # 16-bit numbers multiply exactly in fp32, so the fp32 product is what to compare with
    plain = (grad_output.float().T @ x.float()).reshape(-1)[index.long()]
    truth = (grad_output.double().T @ x.double()).reshape(-1)[index.long()]
    assert_within_budget(actual, plain, truth)


@DTYPES
@pytest.mark.parametrize("density", [0.005, 0.1, 0.6, 1.0])
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"),
    [(1, 1, 1), (7, 9, 5), (129, 200, 40), (700, 41, 230), (1025, 97, 104)],
    ids=lambda n: str(n),
)
def test_uniform_index(
    any_code_path: str,
    tokens: int,
    out_features: int,
    in_features: int,
    density: float,
    dtype: torch.dtype,
) -> None:
    grad_output, x = operands(tokens, out_features, in_features, dtype)
    check(grad_output, x, uniform_index(out_features, in_features, density))


@pytest.mark.parametrize("tokens", [4096, 5000])
def test_several_chunks_of_tokens(any_code_path: str, tokens: int) -> None:
    grad_output, x = operands(tokens, 64, 300)
    check(grad_output, x, uniform_index(64, 300, 0.02))
    check(grad_output, x, uniform_index(64, 300, 0.9))


@DTYPES
@pytest.mark.parametrize("shape", [(150, 170), (170, 150)], ids=["150x170", "170x150"])
def test_clusters(any_code_path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Dense rows, columns and a block beside lone entries: tiles and dot products together."""
    chosen = torch.zeros(shape, dtype=torch.bool)
    chosen[40:75, 3:90] = True
    chosen[80] = True
    chosen[:, 101] = True
    chosen[::17, ::23] = True
    index = chosen.view(-1).nonzero().view(-1).int()
    grad_output, x = operands(300, *shape, dtype)
    check(grad_output, x, index)


@pytest.mark.parametrize("nnz", [0, 1])
@pytest.mark.parametrize("tokens", [0, 3])
def test_no_tokens_and_no_entries(any_code_path: str, tokens: int, nnz: int) -> None:
    grad_output, x = operands(tokens, 6, 4)
    index = torch.tensor([23], dtype=torch.int32)[:nnz]
    expected = (grad_output.T @ x).view(-1)[index.long()]
    torch.testing.assert_close(native.sparse_weight_grad(grad_output, x, index), expected)


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_same_bits_for_any_number_of_threads(
    any_code_path: str, restored_threads: None, density: float
) -> None:
    grad_output, x = operands(3000, 400, 120)
    index = uniform_index(400, 120, density)
    results = []
    for n_threads in (1, 2, 3, 7):
        torch.set_num_threads(n_threads)
        results.append(native.sparse_weight_grad(grad_output, x, index))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("density", [0.05, 0.9])
def test_a_slice_of_a_wider_matrix(any_code_path: str, density: float) -> None:
    grad_output, x = operands(200, 90, 70)
    index = uniform_index(30, 33, density)
    check(grad_output[:, 30:60], x[:, 5:38], index)


def test_nan_reaches_only_the_entries_that_read_it(any_code_path: str) -> None:
    grad_output, x = operands(50, 40, 40)
    grad_output[20, 7] = float("nan")
    x[3, 11] = float("inf")
    for density in (0.2, 1.0):
        index = uniform_index(40, 40, density)
        bad = (index // 40 == 7) | (index % 40 == 11)
        actual = native.sparse_weight_grad(grad_output, x, index)
        assert torch.equal(~actual.isfinite(), bad)


def test_an_index_in_any_order(any_code_path: str) -> None:
    grad_output, x = operands(90, 50, 60)
    index = uniform_index(50, 60, 0.2)
    shuffled = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
    repeated = torch.cat([shuffled, index[:20]])
    check(grad_output, x, repeated)
    check(x, grad_output, repeated)  # the other side streams


@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 1.0])
def test_sampled_blocks(any_code_path: str, restored_threads: None, density: float) -> None:
    cells, index = torch.rand(70, 90), uniform_index(70, 90, density)
    row_begin = torch.searchsorted(index, torch.arange(71) * 90, out_int32=True)
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        grad, next_of_row = torch.full((len(index),), float("nan")), row_begin[:-1].clone()
        for row, high in ((0, 33), (33, 37)):
            for column, wide in ((0, 40), (40, 1), (41, 49)):
                block = cells[row : row + high, column : column + wide].contiguous()
                native.sample_block(block, (row, column), index, row_begin, next_of_row, grad, 90)
        assert torch.equal(grad, cells.flatten()[index])
        assert torch.equal(next_of_row, row_begin[1:])


@pytest.mark.parametrize("position", [-1, 0, 23, 2**31 - 1])
def test_a_block_is_never_read_outside(any_code_path: str, position: int) -> None:
    """Rows 1 and 2 of a 6×4 gradient; `row_begin` says that all is in row 1."""
    index = torch.tensor([4, 5, position, 7], dtype=torch.int32)
    row_begin = torch.tensor([0, 0, 4, 4, 4, 4, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="index: expected the positions that row_begin"):
        native.sample_block(
            torch.zeros(2, 4), (1, 0), index, row_begin, row_begin[:-1].clone(), torch.zeros(4), 4
        )
    with pytest.raises(ValueError, match="cells must lie in the 6×4 gradient"):
        native.sample_block(
            torch.zeros(2, 4), (5, 0), index, row_begin, row_begin[:-1].clone(), torch.zeros(4), 4
        )


@pytest.mark.parametrize("position", [-1, 24, 2**31 - 1])
def test_a_position_out_of_range(position: int) -> None:
    grad_output, x = operands(3, 6, 4)
    index = torch.tensor([0, position], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"index: expected positions in 0\.\.23, got {position}"):
        native.sparse_weight_grad(grad_output, x, index)


def test_layout_and_dtype_are_checked() -> None:
    grad_output, x = operands(3, 6, 4)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="input must have 3 tokens, got 2"):
        native.sparse_weight_grad(grad_output, x[:2], index)
    with pytest.raises(ValueError, match=r"grad_output must be a CPU matrix of .* with contiguous"):
        native.sparse_weight_grad(torch.ones(6, 3).T, x, index)
    with pytest.raises(ValueError, match=r"index must be .* of torch\.int32"):
        native.sparse_weight_grad(grad_output, x, index.long())
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        native.sparse_weight_grad(grad_output.double(), x, index)


@DTYPES
@pytest.mark.parametrize("kind", ["gelu", "tanh_gelu", "layer_norm", "plain_layer_norm"])
@pytest.mark.parametrize(("out_features", "in_features"), [(120, 70), (70, 120)], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.9])
def test_an_activation_is_done_on_the_way(
    any_code_path: str,
    kind: str,
    out_features: int,
    in_features: int,
    density: float,
    dtype: torch.dtype,
) -> None:
    grad_output, x = operands(300, out_features, in_features)
    grad_output = grad_output.to(dtype)
    index = uniform_index(out_features, in_features, density)
    weight, bias = torch.linspace(0.5, 1.5, in_features), torch.linspace(-1, 1, in_features)
    if kind.endswith("layer_norm"):
        affine = (None, None) if kind.startswith("plain") else (weight, bias)
        y, *statistics = torch.native_layer_norm(x, (in_features,), *affine, 1e-5)
        mean, rstd = (each.flatten() for each in statistics)
        held = [0 if each is None else each.data_ptr() for each in (mean, rstd, *affine)]
        number = native.LAYER_NORM
    else:
        number = native.GELU if kind == "gelu" else native.TANH_GELU
        y = F.gelu(x, approximate="none" if kind == "gelu" else "tanh")
        held = [0, 0, 0, 0]
    activation = native.Activation(number, native.DTYPE_NUMBERS[dtype], *held)
    plan = native.WeightGradPlan(index, out_features, in_features)
    actual = plan.run(grad_output, x, 300, (out_features, in_features), activation)
    rounded = y.to(dtype).float()
    plain = (grad_output.float().T @ rounded).reshape(-1)[index.long()]
    truth = (grad_output.double().T @ rounded.double()).reshape(-1)[index.long()]
    # fp32 is rounded to 16 bits anew: one in some hundred is rounded to the other side
    roundings = 4.0 if dtype == torch.float32 else 2**-3 * torch.finfo(dtype).eps * 2**23
    assert_within_budget(actual, plain, truth, roundings=roundings)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_over_all_its_range(any_code_path: str, approximate: str) -> None:
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38, float("inf")])
    x = torch.cat([torch.linspace(-12, 12, 4001), ends])
    grad_output, index = torch.ones(1, 1), torch.arange(len(x), dtype=torch.int32)
    number = native.GELU if approximate == "none" else native.TANH_GELU
    plan = native.WeightGradPlan(index, 1, len(x))
    actual = plan.run(grad_output, x[None], 1, (1, len(x)), native.Activation(number, 0))
    exact = F.gelu(x.double(), approximate=approximate).float()
    torch.testing.assert_close(actual, exact, rtol=3e-7, atol=3e-7)
    nan = plan.run(
        grad_output, x[None] * float("nan"), 1, (1, len(x)), native.Activation(number, 0)
    )
    assert bool(nan.isnan().all())


def test_a_plan_serves_any_number_of_tokens(any_code_path: str) -> None:
    index = uniform_index(60, 80, 0.05)
    plan = native.WeightGradPlan(index, 60, 80)
    expected = index.clone()
    for tokens in (1, 700, 16, 33):
        grad_output, x = operands(tokens, 60, 80)
        check(grad_output, x, index, plan.run(grad_output, x, tokens, (60, 80)))
    index.zero_()  # of which the plan has a copy
    grad_output, x = operands(33, 60, 80)
    check(grad_output, x, expected, plan.run(grad_output, x, 33, (60, 80)))
    with pytest.raises(ValueError, match=r"positions in 0\.\.4799, got 4800"):
        native.WeightGradPlan(torch.tensor([4800], dtype=torch.int32), 60, 80)
