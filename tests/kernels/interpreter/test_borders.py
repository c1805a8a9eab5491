"""No kernel reads or writes past its operands, and all reach beyond 2³¹ elements."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.gradient_ways import tile_plan
from spt_kernels.kernels import (
    rebuild_input,
    sampled_tiles,
    sparse_weight_grad,
    squared_grad,
    squared_vector_grad,
    top_tau,
    transpose,
    write_delta,
)

from .entries import noise, positions

_BAND = 512  # elements on both sides of every operand
_MARK = -77


class Guard:
    """Puts operands between bands of NaN, and sees whether a band was written to."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def put(self, operand: Tensor) -> Tensor:
        inner = self.allocate(*operand.shape, dtype=operand.dtype)
        return inner.copy_(operand)

    def allocate(
        self, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        numel = torch.Size(sizes).numel()
        mark = float("nan") if dtype.is_floating_point else _MARK
        buffer = torch.full((numel + 2 * _BAND,), mark, dtype=dtype)
        self.buffers.append((buffer, numel))
        return buffer[_BAND : _BAND + numel].view(sizes)

    def check(self) -> None:
        for buffer, numel in self.buffers:
            bands = torch.cat([buffer[:_BAND], buffer[_BAND + numel :]])
            whole = bands.isnan() if bands.is_floating_point() else bands == _MARK
            assert whole.all(), f"written past an operand of {numel} elements"


def gradients(guard: Guard, call: Callable[..., Tensor], tiles: bool) -> Tensor:
    grad_output = guard.put(noise(37, 70, seed=0, dtype=torch.bfloat16))
    x = guard.put(noise(37, 67, seed=1, dtype=torch.bfloat16))
    index = guard.put(positions(90, 70 * 67))
    plan = tile_plan.plan_tiles(index, 70, 67)
    return call(grad_output, x, plan if tiles else index).sum(0)


def squares(guard: Guard) -> Tensor:
    score = guard.put(torch.ones(65, 33))
    grad_output = guard.put(noise(2, 35, 65, seed=0, dtype=torch.float16))
    x = guard.put(noise(2, 35, 33, seed=1, dtype=torch.float16))
    squared_grad.accumulate_squared_grad(score, grad_output, x, 1.0)
    return score


def vector_squares(guard: Guard) -> Tensor:
    score = guard.put(torch.ones(65))
    grad_output = guard.put(noise(2, 35, 65, seed=0, dtype=torch.float16))
    squared_vector_grad.accumulate_squared_vector_grad(score, grad_output, grad_output, 1.0)
    return score


def layer_norm(guard: Guard) -> Tensor:
    x = guard.put(noise(17, 130, seed=0, dtype=torch.float32))
    mean, rstd = guard.put(x.mean(1)), guard.put(torch.ones(17))
    weight = guard.put(torch.ones(130))
    return rebuild_input.rebuild_layer_norm(x, mean, rstd, weight, weight, 1, torch.bfloat16)


def gelu(guard: Guard) -> Tensor:
    x = guard.put(noise(2049, seed=0, dtype=torch.bfloat16))
    return rebuild_input.rebuild_gelu(x, "none", torch.bfloat16)


def written(guard: Guard) -> Tensor:
    target = guard.put(torch.zeros(300))
    index = guard.put(positions(33, 300))
    original = guard.put(torch.ones(33))
    write_delta.write_delta([target], [index], [original], [guard.put(torch.ones(33))])
    return target


def chosen(guard: Guard) -> Tensor:
    scores = [guard.put(torch.arange(45.0)), guard.put(torch.arange(7.0).bfloat16())]
    return torch.cat(top_tau.top_tau(scores, 20, [45, 7]))


CASES: dict[str, Callable[[Guard], Tensor]] = {
    "vectors": lambda guard: gradients(guard, sparse_weight_grad.by_vectors, tiles=False),
    "squares-of-tiles": lambda guard: gradients(guard, sampled_tiles.by_tiles, tiles=True),
    "strips": lambda guard: gradients(guard, sampled_tiles.by_tiles, tiles=True),
    "transpose": lambda guard: transpose.transposed(
        guard.put(noise(65, 67, seed=0, dtype=torch.bfloat16))
    ),
    "squared-matrix": squares,
    "squared-vector": vector_squares,
    "layer-norm": layer_norm,
    "gelu": gelu,
    "write-delta": written,
    "top-tau": chosen,
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_touched_past_an_operand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    price = -(10**6) if name == "strips" else 10**6
    monkeypatch.setattr(tile_plan, "_STAGED_VALUES_PER_COPIED", price)
    guard = Guard()
    monkeypatch.setattr(torch, "empty", guard.allocate)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, dtype=None: guard.allocate(x.shape, dtype=dtype or x.dtype)
    )
    result = CASES[name](guard)

    guard.check()
    assert not result.isnan().any(), "something outside was read, or an element not written"


@pytest.fixture(scope="module")
def vast() -> Tensor:
    """Room for 2³² bf16 values; only what is touched takes memory."""
    mapped = mmap.mmap(
        -1,
        2 * (2**32 + 2**12),
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000),
    )
    return torch.frombuffer(mapped, dtype=torch.bfloat16)


def far_apart(vast: Tensor, values: Tensor) -> Tensor:
    """Three rows of values, the last more than 2³¹ elements from the first.

    An offset that wraps around points into the first half, where there are zeros.
    """
    return vast[2**31 :].as_strided(values.shape, (2**30 + 64, 1), 2**31).copy_(values)


@pytest.mark.parametrize("way", ["vectors", "squares-of-tiles", "strips"])
def test_tokens_beyond_2_to_the_31_elements(
    way: str, vast: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    price = -(10**6) if way == "strips" else 10**6
    monkeypatch.setattr(tile_plan, "_STAGED_VALUES_PER_COPIED", price)
    near = noise(3, 40, seed=0, dtype=torch.bfloat16)
    far = far_apart(vast, near)
    index = positions(50, 40 * 40)
    plan = tile_plan.plan_tiles(index, 40, 40)
    expected = (near.float().T @ near.float()).flatten()[index.long()]
    if way == "vectors":
        found = sparse_weight_grad.by_vectors(far, far, index)
    else:
        found = sampled_tiles.by_tiles(far, far, plan)
    torch.testing.assert_close(found.sum(0), expected, rtol=1e-5, atol=1e-5)


def test_samples_and_tokens_beyond_2_to_the_31_elements(vast: Tensor) -> None:
    near = noise(3, 40, seed=0, dtype=torch.bfloat16)
    far = far_apart(vast, near)
    expected = (near.float().T @ near.float()).square()
    for shape in ((1, 3), (3, 1)):  # one sample of three tokens, three samples of one
        x = far.as_strided((*shape, 40), (far.stride(0), far.stride(0), 1), 2**31)
        if shape == (3, 1):
            expected = torch.einsum("to,ti->toi", near.float(), near.float()).square().sum(0)
        score = torch.zeros(40, 40)
        squared_grad.accumulate_squared_grad(score, x, x, 1.0)
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)

        vector = torch.zeros(40)
        squared_vector_grad.accumulate_squared_vector_grad(vector, x, None, 1.0)
        sums = near.float().view(*shape, 40).sum(1).square().sum(0)
        torch.testing.assert_close(vector, sums, rtol=1e-5, atol=1e-5)


def test_rows_beyond_2_to_the_31_elements(vast: Tensor) -> None:
    near = noise(3, 40, seed=0, dtype=torch.bfloat16)
    far = far_apart(vast, near)
    assert torch.equal(transpose.transposed(far)[:, :3], near.T)
    mean, rstd = torch.zeros(3), torch.ones(3)
    found = rebuild_input.rebuild_layer_norm(far, mean, rstd, None, None, 1, torch.bfloat16)
    assert torch.equal(found, near)
