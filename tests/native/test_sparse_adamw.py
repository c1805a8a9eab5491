"""C++ sparse AdamW against torch.optim.AdamW and a plain-integer model of stochastic rounding."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from spt_kernels import native

ABSENT = torch.empty(0)
EPS = torch.finfo(torch.float32).eps  # one ulp of 1, at most two of anything else
NO_INDEX = torch.empty(0, dtype=torch.int32)
DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


def hyper_row(
    step: float = 1, maximize: bool = False, entry_id: int = 0, **changes: float
) -> Tensor:
    values = {**DEFAULTS, **changes}
    return torch.tensor([*values.values(), step, float(maximize), entry_id], dtype=torch.float64)


def run_dense(
    values: Tensor, grads: Sequence[Tensor], maximize: bool = False, **changes: float
) -> tuple[Tensor, Tensor, Tensor]:
    param, exp_avg, exp_avg_sq = values.clone(), torch.zeros_like(values), torch.zeros_like(values)
    for step, grad in enumerate(grads, start=1):
        native.sparse_adamw(
            [param], [grad], [exp_avg], [exp_avg_sq], [ABSENT], [NO_INDEX], [ABSENT],
            hyper_row(step, maximize, **changes)[None], False, 0,
        )  # fmt: skip
    return param, exp_avg, exp_avg_sq


def run_torch(
    values: Tensor, grads: Sequence[Tensor], maximize: bool = False, **changes: float
) -> tuple[Tensor, Tensor, Tensor]:
    hyper = {**DEFAULTS, **changes}
    param = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW(
        [param],
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        maximize=maximize,
        foreach=False,
    )
    for grad in grads:
        param.grad = grad
        optimizer.step()
    state = optimizer.state[param]
    return param.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("n", [1, 7, 20_000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_decay": 0.0}, {"beta1": 0.3, "beta2": 0.5}, {"lr": 0.5, "eps": 1e-3},
     {"beta1": 0.0}],
    ids=["defaults", "no-decay", "small-betas", "large-lr", "no-momentum"],
)  # fmt: skip
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_ten_steps_of_torch_adamw(
    code_path: str, n: int, changes: dict[str, float], maximize: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(n, generator=random)
    grads = [torch.randn(n, generator=random) * 10.0 ** -(i % 5) for i in range(10)]
    ours = run_dense(values, grads, maximize, **changes)
    theirs = run_torch(values, grads, maximize, **changes)
    # the rounding of a step is relative to the largest number that goes into it
    lr = changes.get("lr", DEFAULTS["lr"])
    largest_grad = torch.stack(grads).abs().amax(0)
    scales = (values.abs() + 10 * lr, largest_grad, largest_grad.square())
    for actual, expected, scale in zip(ours, theirs, scales, strict=True):
        assert ((actual - expected).abs() <= 10 * EPS * scale).all()


def test_a_step_is_within_two_ulps_of_float64(code_path: str) -> None:
    random = torch.Generator().manual_seed(1)
    values, grad = (torch.randn(10_000, generator=random) for _ in range(2))
    ours = run_dense(values, [grad])
    exact = run_torch(values.double(), [grad.double()])
    scales = (values.abs() + DEFAULTS["lr"], grad.abs(), grad.square())
    for actual, truth, scale in zip(ours, exact, scales, strict=True):
        assert ((actual - truth).abs() <= 2 * EPS * scale.double()).all()


def test_code_paths_have_the_same_bits() -> None:
    random = torch.Generator().manual_seed(2)
    values = torch.randn(1003, generator=random)
    grads = [torch.randn(1003, generator=random) for _ in range(3)]
    results = []
    for path in native.INSTRUCTION_SETS:
        native.limit_instruction_set(path)
        results.append(run_dense(values, grads))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def sparse_entry(numel: int, nnz: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """param, grad, exp_avg, exp_avg_sq, target, index, original."""
    random = torch.Generator().manual_seed(seed)
    index = torch.randperm(numel, generator=random)[:nnz].sort().values.int()
    target = torch.randn(numel, generator=random).to(dtype)
    delta, grad, exp_avg = (torch.randn(nnz, generator=random) * 0.1 for _ in range(3))
    exp_avg_sq = torch.rand(nnz, generator=random)
    return [delta, grad, exp_avg, exp_avg_sq, target, index, target[index.long()]]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_base_plus_delta_is_written(
    restored_threads: None, dtype: torch.dtype, n_threads: int
) -> None:
    torch.set_num_threads(n_threads)
    rows = [sparse_entry(50_000, nnz, dtype, nnz) for nnz in (1, 0, 20_001)]
    rows.insert(1, [*sparse_entry(9, 9, dtype, 4)[:4], ABSENT, NO_INDEX, ABSENT])  # a dense one
    before = [row[4].clone() for row in rows]
    native.sparse_adamw(*zip(*rows, strict=True), torch.stack([hyper_row(step=3)] * 4), False, 0)
    for (param, _, _, _, target, index, original), old in zip(rows, before, strict=True):
        if target.numel():
            expected = old.index_put((index.long(),), (original.float() + param).to(dtype))
            assert torch.equal(target, expected)


def test_hyperparameters_are_each_entrys_own_and_step_0_is_skipped() -> None:
    random = torch.Generator().manual_seed(3)
    values, grad = torch.randn(5, generator=random), torch.randn(5, generator=random)
    params = [values.clone() for _ in range(3)]
    states = [[torch.zeros(5) for _ in range(3)] for _ in range(2)]
    hyper = torch.stack([hyper_row(lr=0.1), hyper_row(step=0), hyper_row(lr=0.2)])
    native.sparse_adamw(
        params, [grad] * 3, *states, [ABSENT] * 3, [NO_INDEX] * 3, [ABSENT] * 3, hyper, False, 0
    )
    assert torch.equal(params[0], run_dense(values, [grad], lr=0.1)[0])
    assert torch.equal(params[1], values)
    assert torch.equal(states[0][1], torch.zeros(5))
    assert torch.equal(params[2], run_dense(values, [grad], lr=0.2)[0])


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def rounded_by_hand(value: float, random: int, dtype: torch.dtype) -> float:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    magnitude = bits & 0x7FFFFFFF
    low = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    lowest, highest = {
        torch.bfloat16: (0, 0x7F7FFFFF),
        torch.float16: (0x38800000, 0x477FDFFF),  # 2^-14 and just below 65504
    }[dtype]
    if not lowest <= magnitude <= highest:
        return torch.tensor(value).to(dtype).float().item()
    kept = (bits + (random & low)) & ~low & 0xFFFFFFFF
    return struct.unpack("<f", struct.pack("<I", kept))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("seed", "step", "entry_id"), [(0, 1, 0), (2**33 + 77, 100_000, 12)])
def test_stochastic_rounding_bit_for_bit(
    dtype: torch.dtype, seed: int, step: int, entry_id: int
) -> None:
    row = sparse_entry(3000, 1000, dtype, 0)
    row[0] *= 10.0 ** torch.linspace(-8, 7, 1000)  # from fp16 subnormals to beyond its largest
    row[4].zero_()
    row[6].zero_()
    row[0][:3] = torch.tensor([float("nan"), float("inf"), -3.4e38])
    native.sparse_adamw(*([t] for t in row), hyper_row(step, entry_id=entry_id)[None], True, seed)
    seed_low = seed & 0xFFFFFFFF
    stream = mix(seed_low ^ (step * 0x9E3779B9 & 0xFFFFFFFF)) ^ (entry_id * 0x85EBCA6B & 0xFFFFFFFF)
    expected = [
        rounded_by_hand(value, mix(stream ^ k), dtype) for k, value in enumerate(row[0].tolist())
    ]
    actual = row[4][row[5].long()].float()
    assert torch.equal(actual.nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0))


def test_stochastic_rounding_is_without_bias() -> None:
    row = [torch.full((20_000,), 1 + 2**-9), *(torch.zeros(20_000) for _ in range(3))]
    target = torch.zeros(20_000, dtype=torch.bfloat16)
    index = torch.arange(20_000, dtype=torch.int32)
    native.sparse_adamw(
        *([t] for t in row), [target], [index], [target.clone()],
        hyper_row(weight_decay=0.0)[None], True, 5,
    )  # fmt: skip
    # a quarter of the way from 1 to the next bf16: up in a quarter of the cases
    assert set(target.float().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((target > 1).float().mean().item() - 0.25) < 0.01


def test_bad_arguments_change_nothing() -> None:
    row = sparse_entry(100, 10, torch.float32, 0)
    row[5][9] = 100
    before = [t.clone() for t in row]
    with pytest.raises(ValueError, match=r"indices\[0\]: expected positions in 0\.\.99, got 100"):
        native.sparse_adamw(*([t] for t in row), hyper_row()[None], False, 0)
    row[5][9] = 99
    with pytest.raises(ValueError, match=r"grads\[0\] must have 10 elements, got 9"):
        native.sparse_adamw(
            [row[0]], [row[1][:9]], *([t] for t in row[2:]), hyper_row()[None], False, 0
        )
    with pytest.raises(ValueError, match=r"hyper must have 8 elements, got 16"):
        native.sparse_adamw(*([t] for t in row), torch.stack([hyper_row()] * 2), False, 0)
    assert all(
        torch.equal(a, b) for i, (a, b) in enumerate(zip(row, before, strict=True)) if i != 5
    )


def test_a_plan_counts_steps_and_takes_the_numbers_of_each_group() -> None:
    rows = [sparse_entry(5000, 3001, torch.bfloat16, 1), sparse_entry(70, 65, torch.float32, 2)]
    twins = [[part.clone() for part in row] for row in rows]
    steps = [torch.tensor(0.0), torch.tensor(4.0)]
    params, grads, exp_avgs, exp_avg_sqs, targets, indices, originals = zip(*rows, strict=True)
    plan = native.AdamWPlan(
        params, exp_avgs, exp_avg_sqs, targets, indices, originals, [7, 2**32 + 9],
        steps=steps, groups=[1, 0],
    )  # fmt: skip
    numbers = [(0.2, 0.8, 0.9, 1e-6, 0.1, 1.0), (0.1, 0.9, 0.99, 1e-8, 0.0, 0.0)]
    for n in range(2):
        plan.step([grad.data_ptr() for grad in grads], numbers, True, 5)
        hyper = torch.tensor(
            [[*numbers[1][:5], 1 + n, 0.0, 7], [*numbers[0][:5], 5 + n, 1.0, 9]],
            dtype=torch.float64,
        )
        native.sparse_adamw(*zip(*twins, strict=True), hyper, True, 5)
    assert [float(step) for step in steps] == [2.0, 6.0]
    for row, twin in zip(rows, twins, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, twin, strict=True))


def test_a_plan_refuses_what_does_not_fit() -> None:
    row = sparse_entry(50, 20, torch.float32, 3)
    columns = [[row[i]] for i in (0, 2, 3, 4, 5, 6)]
    step = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"steps\[0\] must have 1 elements"):
        native.AdamWPlan(*columns, [0], steps=[torch.zeros(2)], groups=[0])
    row[5][-1] = 50
    with pytest.raises(ValueError, match=r"indices\[0\]: expected positions in 0\.\.49, got 50"):
        native.AdamWPlan(*columns, [0], steps=[step], groups=[0])


@pytest.mark.parametrize("position", [-1, 50, 2**31 - 1])
def test_a_position_that_goes_astray_later_is_never_written(position: int) -> None:
    row = sparse_entry(50, 20, torch.float32, 3)
    room = torch.zeros(150)
    row[4] = room[50:100].copy_(row[4])
    columns = [[row[i]] for i in (0, 2, 3, 4, 5, 6)]
    step = torch.tensor(0.0)  # a plan keeps nothing alive
    plan = native.AdamWPlan(*columns, [0], steps=[step], groups=[0])
    row[5][-1] = position
    with pytest.raises(ValueError, match=rf"expected positions in 0\.\.49, got {position}"):
        plan.step([row[1].data_ptr()], [(0.1, 0.9, 0.99, 1e-8, 0.0, 0.0)], False, 0)
    assert not room[:50].any()
    assert not room[100:].any()
