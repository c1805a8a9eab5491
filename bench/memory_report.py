"""The peaks of all cost tables side by side, and what is held against them, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spt_kernels.costs import PAPER_MODEL, CostRow, CostSetting, Table7
from spt_kernels.costs.results import TABLES

from .cost_report import emphasised
from .markdown import markdown

SWIN, CONVNEXT = "swin_base_patch4_window7_224", "convnext_base"
SHORT = {PAPER_MODEL: "ViT-B/16", SWIN: "Swin-B", CONVNEXT: "ConvNeXt-B"}
Key = tuple[str, str]  # model, dtype
FP32, AUTOCAST, BF16 = ((PAPER_MODEL, dtype) for dtype in ("fp32", "bf16-autocast", "bf16"))
COLUMNS = (FP32, AUTOCAST, BF16, (SWIN, "fp32"), (CONVNEXT, "fp32"))

# The row, where; the row beside it, where; and the highest ratio of their peaks that will do
TARGETS: tuple[tuple[str, Key, str, Key, float], ...] = (
    *(
        (name, key, "lora-16", key, 0.95)
        for key in (FP32, AUTOCAST, BF16)
        for name in ("spt-lora", "spt-unstructured")
    ),
    *(("spt-lora", key, "spt-lora-structured", key, 1.01) for key in (FP32, AUTOCAST, BF16)),
    *((name, BF16, "lora-16", AUTOCAST, 0.9) for name in ("spt-lora", "spt-unstructured")),
    *(
        (name, (model, "fp32"), "peft-lora-all", (model, "fp32"), 1.0)
        for model in (SWIN, CONVNEXT)
        for name in ("spt-lora", "spt-unstructured")
    ),
)


def memory_table(measured: Mapping[str, Any]) -> str:
    """GiB of a training step, and its ratio to LoRA-16 of the same column."""
    tables = peaks(measured)
    rows: dict[str, list[str]] = {}
    for column, table in enumerate(tables.values()):
        for row in table.rows:
            cells = rows.setdefault(row.method, [emphasised(row)])
            cells += [""] * (1 + column - len(cells))
            ratio = table.over(row, "lora-16", "tuning_peak_bytes")
            cells.append(f"{row.tuning_peak_bytes / 2**30:.2f} ({ratio:.2f})")
    titles = [f"{SHORT.get(model, model)}, {dtype}" for model, dtype in tables]
    filled = [cells + [""] * (1 + len(tables) - len(cells)) for cells in rows.values()]
    return markdown(("", *titles), filled)


def target_table(measured: Mapping[str, Any]) -> str:
    """Each pair of rows that has a target, and whether it is reached."""
    tables = peaks(measured)
    rows = []
    for name, here, rival, there, target in TARGETS:
        ours, theirs = _row(tables, here, name), _row(tables, there, rival)
        if ours is None or theirs is None:
            continue
        ratio = ours.tuning_peak_bytes / theirs.tuning_peak_bytes
        where = f"{SHORT[here[0]]}, {here[1]}"
        other = rival if here == there else f"{rival} in {there[1]}"
        missed = ", missed" if ratio > target else ""
        rows.append((f"{where}: {name} / {other}", f"{ratio:.3f}", f"{target:.2f}{missed}"))
    return markdown(("peak of a training step", "ratio", "target"), rows)


def peaks(measured: Mapping[str, Any]) -> dict[Key, Table7]:
    """The accounted tables at the paper's sizes, the paper's model first."""
    found: dict[Key, Table7] = {}
    for value in measured.get(TABLES, {}).values():
        table = Table7.from_json(value)
        setting = table.setting
        usual = CostSetting(model=setting.model, dtype=setting.dtype, rounds=0)
        if replace(setting, rounds=0).title() == usual.title() and not setting.on_gpu:
            found[setting.model, setting.dtype] = table
    order = [*COLUMNS, *sorted(found.keys() - set(COLUMNS))]
    return {key: found[key] for key in order if key in found}


def _row(tables: Mapping[Key, Table7], key: Key, name: str) -> CostRow | None:
    rows = tables[key].rows if key in tables else ()
    return next((row for row in rows if row.method == name), None)
