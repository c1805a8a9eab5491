"""Accounted peak memory of a training step of each method, by category, beside the targets.

`python -m bench.bench_memory` prints every table; under pytest, the rows that have targets.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import timm
from torch import nn

from spt_kernels.memory import DTYPES, MemoryEstimate, estimate_memory
from spt_kernels.memory_ledger import CATEGORIES

from . import memory_methods as methods
from .contest import record

MODELS = ("vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base")
BATCH, CLASSES = 64, 100
Estimates = dict[str, MemoryEstimate]

# What is held against what: the row, the one beside it, and the highest ratio that will do
TARGETS = {
    "vit_base_patch16_224": (
        (methods.SPT_LORA, methods.LORA, 0.95),
        (methods.UNSTRUCTURED, methods.LORA, 0.95),
        (methods.SPT_LORA, methods.STRUCTURED_ONLY, 1.01),
    ),
    "swin_base_patch4_window7_224": (
        (methods.SPT_LORA, methods.LORA_EVERYWHERE, 1.0),
        (methods.UNSTRUCTURED, methods.LORA_EVERYWHERE, 1.0),
    ),
    "convnext_base": (
        (methods.SPT_LORA, methods.LORA_EVERYWHERE, 1.0),
        (methods.UNSTRUCTURED, methods.LORA_EVERYWHERE, 1.0),
    ),
}
BF16_BASE_TARGET = 0.9  # of ours on a bf16 base, against LoRA-16 under autocast


def estimates_of(name: str, dtype: str, rows: Sequence[str] = ()) -> Estimates:
    """The accounted peak of each method, or of those in `rows`, for a model of timm's."""
    base, prepared = _prepared(name)
    return {
        row: estimate_memory(methods.accountable(prepare(base)), (BATCH, 3, 224, 224), dtype=dtype)
        for row, prepare in prepared.items()
        if not rows or row in rows
    }


@functools.lru_cache(maxsize=1)
def _prepared(name: str) -> tuple[nn.Module, dict[str, methods.Prepare]]:
    base = timm.create_model(name, num_classes=CLASSES)
    return base, methods.methods(base)


def table(name: str, dtype: str, estimates: Estimates) -> list[str]:
    """One line per method, MiB by category, and the ratios that have a target."""
    lines = [f"{name}, batch {BATCH}, {dtype}: accounted peak of a training step in MiB"]
    head = "".join(f"{category:>12}" for category in CATEGORIES)
    lines.append(f"  {'':<28}{'trained':>12}{head}{'peak':>12}")
    for row, estimate in estimates.items():
        parts = "".join(f"{estimate.by_category[c] / 2**20:>12,.1f}" for c in CATEGORIES)
        peak = f"{estimate.peak_bytes / 2**20:>12,.1f}"
        lines.append(f"  {row:<28}{estimate.num_trainable:>12,}{parts}{peak}")
    for ours, other, target in TARGETS[name]:
        if ours in estimates and other in estimates:
            judged = _judged(_ratio(estimates[ours], estimates[other]), target)
            lines.append(f"  {ours} / {other}: {judged}")
    return lines


def _ratio(ours: MemoryEstimate, other: MemoryEstimate) -> float:
    return ours.peak_bytes / other.peak_bytes


def _compared(name: str) -> list[str]:
    """The rows that a target needs, beside full fine-tuning."""
    return [methods.FULL, *{row for pair in TARGETS[name] for row in pair[:2]}]


@pytest.mark.parametrize("dtype", DTYPES)
def test_vit_b(benchmark: Any, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    estimates = _bench(benchmark, capsys, MODELS[0], dtype)
    if dtype == "bf16":
        under_autocast = estimates_of(MODELS[0], "bf16-autocast", (methods.LORA,))[methods.LORA]
        facts = {
            f"{row} / PEFT LoRA-16 under autocast": _judged(ratio, BF16_BASE_TARGET)
            for row in (methods.SPT_LORA, methods.UNSTRUCTURED)
            for ratio in [_ratio(estimates[row], under_autocast)]
        }
        record(benchmark, f"{MODELS[0]}: a bf16 base model with fp32 deltas", facts)


@pytest.mark.parametrize("name", MODELS[1:])
def test_hierarchical_models(benchmark: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    _bench(benchmark, capsys, name, "fp32")


def _bench(benchmark: Any, capsys: pytest.CaptureFixture[str], name: str, dtype: str) -> Estimates:
    pytest.importorskip("peft")
    benchmark.group = f"memory accounting: {name}, {dtype}"
    estimates = benchmark.pedantic(estimates_of, (name, dtype, _compared(name)), rounds=1)
    with capsys.disabled():
        print("", *table(name, dtype, estimates), sep="\n")
    facts = {f"{row}, MiB": f"{e.peak_bytes / 2**20:,.1f}" for row, e in estimates.items()}
    for ours, other, target in TARGETS[name]:
        facts[f"{ours} / {other}"] = _judged(_ratio(estimates[ours], estimates[other]), target)
    record(benchmark, f"accounted peak of a training step: {name}, batch {BATCH}, {dtype}", facts)
    return estimates


def _judged(ratio: float, target: float) -> str:
    return f"{ratio:.3f}, target {target:.2f}{'' if ratio <= target else ', missed'}"


def main() -> None:
    """Print the tables that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    chosen = parser.parse_args()
    for name in chosen.model or MODELS:
        for dtype in chosen.dtype or DTYPES:
            print(*table(name, dtype, estimates_of(name, dtype)), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
