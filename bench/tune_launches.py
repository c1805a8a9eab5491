"""Times launch configurations on the card at hand beside the shipped ones, and every way's rate.

`python -m bench.tune_launches [--json FILE]`; without a CUDA device it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spt_kernels.costs.drawn_mask import draw_mask
from spt_kernels.gradient_ways.tile_plan import plan_tiles
from spt_kernels.kernels import sampled_tiles, squared_grad
from spt_kernels.kernels import sparse_weight_grad as gradient_kernels
from spt_kernels.kernels.card import Launch, capability_of
from spt_kernels.kernels.prepared_launch import PreparedLaunches
from spt_kernels.kernels.sampled_tiles import by_tiles

Measure = Callable[[Callable[[], object]], float]  # a call -> its median in microseconds


@dataclass(frozen=True)
class Timing:
    """One configuration of one kernel: its median, or why it did not run."""

    kernel: str
    case: str
    launch: dict[str, int]
    shipped: bool
    median_us: float | None
    error: str = ""


def median_us(run: Callable[[], object], rounds: int = 20) -> float:
    """Median of runs between events, after a warm-up; L2 is flushed before each."""
    flush = torch.empty(1 << 26, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def candidates(shipped: Launch) -> Iterator[Launch]:
    """The shipped configuration first, then its neighbours."""
    yield shipped
    for stages in {2, 3, 4, 5} - {shipped.num_stages}:
        yield replace(shipped, num_stages=stages)
    for warps in {2, 4, 8} - {shipped.num_warps}:
        yield replace(shipped, num_warps=warps)
    for tokens in {16, 32, 64} - {shipped.tokens}:
        yield replace(shipped, tokens=tokens)
    for programs in {1, 2, 3, 4} - {shipped.programs_per_sm}:
        yield replace(shipped, programs_per_sm=programs)


def factors(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient of the output and an input, random."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((tokens, rows), (tokens, columns))
    grad_output, inputs = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
    )
    return grad_output, inputs


def tune_tiles(
    measure: Measure, device: torch.device, rows: int, columns: int, tokens: int, density: float
) -> Iterator[Timing]:
    """Configurations of the kernel that a uniform mask of this density would be computed with."""
    index = draw_mask(rows, columns, density).to(device)
    plan = plan_tiles(index, rows, columns)
    kernel = "squares" if plan.lists is None else "strips"
    for dtype in (torch.bfloat16, torch.float32):
        run = partial(by_tiles, *factors(rows, columns, tokens, dtype, device), plan)
        case = f"{rows}×{columns}, {density:.2%}, {dtype}, width {plan.width}"
        key = (plan.block, plan.width, dtype == torch.float32, capability_of(device))
        shipped = sampled_tiles.LAUNCHES[key]
        try:
            for launch in candidates(shipped):
                sampled_tiles.LAUNCHES[key] = launch
                sampled_tiles._launches = PreparedLaunches()  # of which no key tells the launch
                yield _timing(kernel, case, launch, launch == shipped, run, measure)
        finally:
            sampled_tiles.LAUNCHES[key] = shipped


def time_ways(
    measure: Measure, device: torch.device, rows: int, columns: int, tokens: int, density: float
) -> Iterator[Timing]:
    """Every way to the sparse weight gradient, and torch's dense one: the cost model's matter."""
    index = draw_mask(rows, columns, density).to(device)
    plan = plan_tiles(index, rows, columns)
    kernel = "squares" if plan.lists is None else "strips"
    for dtype in (torch.bfloat16, torch.float32):
        both = factors(rows, columns, tokens, dtype, device)
        runs: dict[str, Callable[[], object]] = {
            "torch, dense": partial(torch.mm, both[0].T, both[1]),
            "chosen": partial(gradient_kernels.sparse_weight_grad, *both, index, plan),
            "vectors": partial(gradient_kernels.by_vectors, *both, index),
            kernel: partial(by_tiles, *both, plan),
            "dense, then read": partial(gradient_kernels.by_dense, *both, index),
        }
        for name, run in runs.items():
            case = f"{rows}×{columns}, {density:.2%}, {dtype}"
            yield _timing(f"way: {name}", case, None, True, run, measure)


def tune_squares(
    measure: Measure, device: torch.device, rows: int, columns: int, samples: int, tokens: int
) -> Iterator[Timing]:
    """Configurations of the squared gradients' large tiles."""
    score = torch.zeros(rows, columns, device=device)
    shipped = squared_grad._LARGE
    flat = factors(rows, columns, samples * tokens, torch.bfloat16, device)
    both = (factor.view(samples, tokens, -1) for factor in flat)
    run = partial(squared_grad.accumulate_squared_grad, score, *both, 1.0)
    case = f"{rows}×{columns}, {samples} × {tokens} tokens, {torch.bfloat16}"
    others = [replace(shipped, num_stages=stages) for stages in (3, 4)]
    others += [replace(shipped, tokens=64, num_stages=3)]
    try:
        for tile in [shipped, *others]:
            squared_grad._LARGE = tile
            yield _timing("squared_grad", case, tile, tile == shipped, run, measure)
    finally:
        squared_grad._LARGE = shipped


def _timing(
    kernel: str,
    case: str,
    launch: Any,
    shipped: bool,
    run: Callable[[], object],
    measure: Measure,
) -> Timing:
    shown = {} if launch is None else asdict(launch)
    try:
        return Timing(kernel, case, shown, shipped, measure(run))
    except Exception as error:  # too much shared memory for this card, say: that is the finding
        return Timing(kernel, case, shown, shipped, None, f"{type(error).__name__}: {error}")


def everything(
    measure: Measure,
    device: torch.device,
    *,
    rows: int = 3072,
    columns: int = 768,
    samples: int = 64,
    tokens: int = 197,
) -> Iterator[Timing]:
    """All of the above at fc1 of ViT-B/16, batch 64."""
    for density in (0.001, 0.005, 0.01, 0.02, 0.05):
        yield from time_ways(measure, device, rows, columns, samples * tokens, density)
    for density in (0.005, 0.01, 0.05):
        yield from tune_tiles(measure, device, rows, columns, samples * tokens, density)
    yield from tune_squares(measure, device, rows, columns, samples, tokens)


def main(arguments: list[str] | None = None) -> int:
    """Time everything, print each line as it comes, write all as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_launches", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to tune")
        return 0
    timings = []
    for timing in everything(median_us, torch.device("cuda")):
        timings.append(timing)
        time = "failed" if timing.median_us is None else f"{timing.median_us:.1f} µs"
        mark = " (shipped)" if timing.launch and timing.shipped else ""
        print(f"{timing.kernel}, {timing.case}: {time} {timing.launch}{mark}", flush=True)
        if options.json:  # after each, so that a time limit loses nothing
            _write(options.json, timings)
    return 0


def _write(path: Path, timings: list[Timing]) -> None:
    import triton

    found = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timings": [asdict(timing) for timing in timings],
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
