"""Times block sizes of a LoRA's kernels on the card at hand, the shipped ones among them.

`python -m bench.tune_low_rank [--json FILE]`; without a CUDA device it says so and ends. All are
compiled first, in many processes; then each is timed alone, the fastest printed first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_kernels.kernels import low_rank, low_rank_grad
from spt_kernels.kernels.card import INTERPRETED, capability_of, cdiv
from spt_kernels.kernels.low_rank_parts import blocks_of
from spt_kernels.kernels.token_split import split_tokens

TOKENS, RANK, COLUMNS = 64 * 197, 8, 16
WORDS = (0x9E3779B9, 0x85EBCA6B, 429_496_730)  # of a dropout of 0.1
NOTHING = (0, 0, 0)


@dataclass(frozen=True)
class Case:
    """What a kernel is given.

    Attributes:
        kind: `"down"`, `"up"` or `"grad"`.
        width: features of the activation, in bf16.
        n_ranges: that they are divided into; of several nothing is dropped, and factors are tall.
        activation: of the gradient's source.
    """

    kind: str
    width: int
    n_ranges: int = 1
    activation: str = "none"


@dataclass(frozen=True)
class Blocks:
    """How a kernel is launched."""

    tokens: int
    features: int
    num_stages: int
    num_warps: int


CASES = (
    *(Case("down", width) for width in (768, 3072)),
    Case("down", 2304, n_ranges=3),
    *(Case("up", width) for width in (768, 3072)),
    Case("up", 2304, n_ranges=3),
    Case("grad", 768, activation="layer_norm"),
    Case("grad", 3072, activation="gelu"),
    Case("grad", 768),
)
STAGES = {"down": (3, 4), "up": (1,), "grad": (3, 4)}


def shipped(case: Case, capability: int = 90) -> Blocks:
    """What a case is launched with."""
    own = blocks_of(torch.bfloat16, RANK, is_made=case.activation != "none")
    launch = {"down": low_rank._DOWN, "up": low_rank._UP}.get(
        case.kind, low_rank_grad._launch(own["BLOCK_RANK"], capability)
    )
    sizes = own["BLOCK_TOKENS"], own["BLOCK_FEATURES"]
    return Blocks(*sizes, launch.num_stages, launch.num_warps)


def candidates(kind: str) -> Iterator[Blocks]:
    """All that are tried of a kernel."""
    for sizes in itertools.product((16, 32, 64), (64, 128, 256), STAGES[kind], (2, 4, 8)):
        yield Blocks(*sizes)


def prepared(
    case: Case, blocks: Blocks, device: torch.device, tokens: int = TOKENS
) -> tuple[Any, int, tuple[Any, ...]]:
    """The kernel, its grid and its arguments, of which the first is the output."""
    generator = torch.Generator(device).manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    fp32, width, n = torch.float32, case.width, case.n_ranges
    sizes = blocks.tokens, blocks.features, COLUMNS, INTERPRETED
    x = made(tokens, width)
    if case.kind == "grad":
        is_norm = case.activation == "layer_norm"
        source = x.float() if is_norm else x
        norm = [made(size, dtype=fp32) for size in (tokens, tokens, width, width)]
        programs = cdiv(width, blocks.features)
        launch = low_rank_grad._launch(COLUMNS, capability_of(device))
        splits, of_each = split_tokens(tokens, programs, launch, device)
        of_each = cdiv(of_each, blocks.tokens) * blocks.tokens
        splits = cdiv(tokens, of_each)
        partial = torch.empty(splits, RANK, width, dtype=fp32, device=device)
        arguments = (
            *(partial, source, made(tokens, RANK), *(norm if is_norm else [source] * 4), source),
            *(tokens, of_each, width, *WORDS),
            *(RANK, case.activation, is_norm, is_norm, True, False, *sizes),
        )
        return low_rank_grad.grad_kernel, programs * splits, arguments
    is_tall = n > 1
    factor = made(*((width, RANK) if is_tall else (RANK, width)), dtype=fp32)
    span = 0, width // n if is_tall else 0, width // n  # first, step and width of the ranges
    words = NOTHING if is_tall else WORDS
    if case.kind == "down":
        output = x.new_empty(tokens, n * RANK)
        arguments = (
            *(output, x, factor, x, tokens, width, *span, n * RANK, 1.5, *words),
            *(RANK, is_tall, not is_tall, False, *sizes),
        )
        return low_rank.down_kernel, cdiv(tokens, blocks.tokens) * n, arguments
    output = x.clone() if is_tall else torch.empty(tokens, width, device=device)
    bias = made(width, dtype=fp32)
    arguments = (
        *(output, output if is_tall else x, made(tokens, n * RANK), factor, bias, x),
        *(tokens, width, *span, 1.0, *words),
        *(RANK, n, n * RANK, is_tall, is_tall, not is_tall, False, *sizes),
    )
    programs = cdiv(tokens, blocks.tokens) * n * cdiv(width // n, blocks.features)
    return low_rank.up_kernel, programs, arguments


def _compile(job: tuple[Case, Blocks]) -> str:
    """Compile for the card of this process, which leaves it in Triton's cache; why it failed."""
    case, blocks = job
    try:
        kernel, programs, arguments = prepared(case, blocks, torch.device("cuda"))
        kernel.warmup(*arguments, grid=(programs,), **_options(blocks))
    except Exception as error:  # of whatever kind: another configuration may do
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return ""


def _options(blocks: Blocks) -> dict[str, int]:
    return {"num_stages": blocks.num_stages, "num_warps": blocks.num_warps}


def tuned(median_us: Callable[[Callable[[], object]], float]) -> Iterator[dict[str, Any]]:
    """Every configuration of every case that compiles, and what it takes."""
    capability = capability_of(torch.device("cuda"))
    jobs = [(case, blocks) for case in CASES for blocks in candidates(case.kind)]
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(14, mp_context=spawning) as pool:
        problems = list(pool.map(_compile, jobs, chunksize=4))
    for (case, blocks), problem in zip(jobs, problems, strict=True):
        row = {"case": asdict(case), "blocks": asdict(blocks), "problem": problem}
        row["shipped"] = blocks == shipped(case, capability)
        if not problem:
            kernel, programs, arguments = prepared(case, blocks, torch.device("cuda"))
            launch = kernel[(programs,)]
            row["us"] = median_us(lambda: launch(*arguments, **_options(blocks)))  # noqa: B023
        yield row


def main() -> None:
    """Print the fastest of each case beside the shipped one."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_low_rank", description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    from triton.testing import do_bench

    rows = list(tuned(lambda run: 1e3 * do_bench(run, warmup=3, rep=12, return_mode="median")))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for case in CASES:
        of_case = sorted(
            (row for row in rows if row["case"] == asdict(case) and "us" in row),
            key=lambda row: row["us"],
        )
        print(case)
        for row in [*of_case[:5], *(row for row in of_case[5:] if row["shipped"])]:
            print(f"  {row['us']:7.1f} µs {row['blocks']}{' (shipped)' * row['shipped']}")
    failed = [row for row in rows if row["problem"]]
    print(f"{len(failed)} of {len(rows)} did not compile", failed[:2])


if __name__ == "__main__":
    main()
