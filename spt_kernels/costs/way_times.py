"""Times every way to a sparse weight gradient on a card, at sizes that tell its rates apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..gradient_ways.gradient_cost import Way, Work
from ..gradient_ways.tile_plan import plan_tiles
from ..kernels.sampled_tiles import by_tiles
from ..kernels.sparse_weight_grad import by_dense, by_vectors
from .drawn_mask import draw_mask

Clock = Callable[[Callable[[], object]], float]  # a call -> what its kernels take, in microseconds

TOKENS = 64 * 197  # of a batch of 64 through a ViT with patches of 16² on 224²
SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 4096))
# of the entries that are wanted; and the share of rows and of columns that they lie in
MASKS = ((0.002, 1.0), (0.005, 1.0), (0.02, 1.0), (0.05, 1.0), (0.005, 0.25), (0.02, 0.25))
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
N_CASES = len(SHAPES) * len(MASKS) * len(_NAMES)


@dataclass(frozen=True)
class WayTimes:
    """One gradient, computed in every way.

    Attributes:
        case: which, in words.
        is_fp32: whether its values are fp32 rather than bf16.
        tokens: summed over.
        work: what the ways do for each of them.
        us: microseconds of kernels.
    """

    case: str
    is_fp32: bool
    tokens: int
    work: Work
    us: Mapping[Way, float]


def graph_us(run: Callable[[], object]) -> float:
    """A call's kernels one after the other, as a captured graph replays them without its host."""
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(run, rep=5, return_mode="median"))


def time_ways(
    device: torch.device, clock: Clock = graph_us, tokens: int = TOKENS
) -> Iterator[WayTimes]:
    """Every shape with every mask in bf16 and fp32, `N_CASES` in all."""
    for rows, columns in SHAPES:
        factors = {dtype: _factors(rows, columns, tokens, dtype, device) for dtype in _NAMES}
        for density, share in MASKS:
            index = draw_mask(rows, columns, density, share).to(device)
            plan = plan_tiles(index, rows, columns)
            where = "" if share == 1 else f" in {share:.2g}²"
            for dtype, both in factors.items():
                runs: dict[Way, Callable[[], object]] = {
                    Way.VECTORS: partial(by_vectors, *both, index),
                    Way.TILES: partial(by_tiles, *both, plan),
                    Way.DENSE: partial(by_dense, *both, index),
                }
                yield WayTimes(
                    f"{rows}×{columns}, {_NAMES[dtype]}, {density:.1%}{where}",
                    dtype == torch.float32,
                    tokens,
                    Work.of(plan, len(index), (rows, columns)),
                    {way: clock(run) for way, run in runs.items()},
                )


def time_tf32(device: torch.device, clock: Clock = graph_us, tokens: int = TOKENS) -> float:
    """How many times as fast torch's fp32 product is with TF32, over all shapes together."""
    matmul = torch.backends.cuda.matmul
    before, us = matmul.fp32_precision, {"ieee": 0.0, "tf32": 0.0}
    try:
        for rows, columns in SHAPES:
            grad_output, inputs = _factors(rows, columns, tokens, torch.float32, device)
            for precision in us:
                matmul.fp32_precision = precision
                us[precision] += clock(partial(torch.mm, grad_output.T, inputs))
    finally:
        matmul.fp32_precision = before
    return us["ieee"] / us["tf32"]


def _factors(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A gradient of the output and an input."""
    generator = torch.Generator(device).manual_seed(0)
    grad_output, inputs = (
        torch.randn(tokens, width, generator=generator, device=device).to(dtype)
        for width in (rows, columns)
    )
    return grad_output, inputs
