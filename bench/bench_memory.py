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
            lines.append(_verdict(ours, other, _ratio(estimates[ours], estimates[other]), target))
    return lines


def _ratio(ours: MemoryEstimate, other: MemoryEstimate) -> float:
    return ours.peak_bytes / other.peak_bytes


def _verdict(ours: str, other: str, ratio: float, target: float) -> str:
    verdict = "" if ratio <= target else "  missed"
    return f"  {ours} / {other}: {ratio:.3f}, target {target:.2f}{verdict}"


def _compared(name: str) -> list[str]:
    """The rows that a target needs, beside full fine-tuning."""
    return [methods.FULL, *{row for pair in TARGETS[name] for row in pair[:2]}]


def _show(capsys: pytest.CaptureFixture[str], lines: Sequence[str]) -> None:
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_vit_b(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    name = MODELS[0]
    benchmark.group = "memory accounting: ViT-B/16, every dtype"
    tables = benchmark.pedantic(
        lambda: {dtype: estimates_of(name, dtype, _compared(name)) for dtype in DTYPES}, rounds=1
    )
    for dtype, estimates in tables.items():
        _show(capsys, table(name, dtype, estimates))
    autocast = tables["bf16-autocast"][methods.LORA]
    for row in (methods.SPT_LORA, methods.UNSTRUCTURED):
        ratio = _ratio(tables["bf16"][row], autocast)
        verdict = _verdict(row, "PEFT LoRA-16 under autocast", ratio, BF16_BASE_TARGET)
        _show(capsys, [verdict])
        benchmark.extra_info[f"bf16 base: {row}"] = ratio
    for dtype, estimates in tables.items():
        for ours, other, _ in TARGETS[name]:
            ratio = _ratio(estimates[ours], estimates[other])
            benchmark.extra_info[f"{dtype}: {ours} / {other}"] = ratio


@pytest.mark.parametrize("name", MODELS[1:])
def test_hierarchical_models(benchmark: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pytest.importorskip("peft")
    benchmark.group = f"memory accounting: {name}, fp32"
    estimates = benchmark.pedantic(estimates_of, (name, "fp32", _compared(name)), rounds=1)
    _show(capsys, table(name, "fp32", estimates))
    for ours, other, _ in TARGETS[name]:
        benchmark.extra_info[f"{ours} / {other}"] = _ratio(estimates[ours], estimates[other])


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
