"""The text table of a plan: trained parameters by block and by operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Cell, Plan

_KINDS = {"lora": "LoRA", "adapter": "Adapter"}
_WORDS = {"lora": "LoRA", "adapter": "Adapt"}  # no wider than a number


def render(plan: Plan) -> str:
    """The summary that `Plan.summary` returns: 80 columns for a ViT, below 100 for a Swin."""
    cells = plan.cells()
    blocks = list(dict.fromkeys(block for block, _ in cells))
    operations = ordered(operation for _, operation in cells)
    whole = plan.num_trainable

    def total(of: Iterable[Cell]) -> int:
        return sum(cell.trainable for cell in of)

    table = [["block", *operations, "all", "share"]]
    for block in blocks:
        here = [cells.get((block, operation)) for operation in operations]
        trained = total(cell for cell in here if cell)
        texts = [_cell(cell, plan.kind) for cell in here]
        table.append([block or "(no block)", *texts, _short(trained), _share(trained, whole)])
    columns = [
        total(cell for (_, own), cell in cells.items() if own == operation)
        for operation in operations
    ]
    table.append(["all", *map(_short, columns), _short(whole), _share(whole, whole)])
    table.append(["share", *(_share(column, whole) for column in columns), _share(whole, whole)])

    lines = _title(plan)
    lines += ["", "trained parameters by block and operation", *_aligned(table)]
    if plan.kind and plan.structured:
        word = _WORDS[plan.kind]
        article = "an" if plan.kind == "adapter" else "a"
        lines.append(f"{word}: {article} {_KINDS[plan.kind]} in place of single parameters")
        if any(cell.structured and cell.unstructured for cell in cells.values()):
            lines.append(f"{word}+: and single parameters besides")
    return "\n".join(lines)


def ordered(operations: Iterable[str]) -> list[str]:
    """Each operation once, matrices in the order they come, then biases and norms."""
    last = ("bias", "norm")
    seen = dict.fromkeys(operations)
    return [o for o in seen if o not in last] + [o for o in last if o in seen]


def _title(plan: Plan) -> list[str]:
    kind = f"{_KINDS[plan.kind]} of rank {plan.rank}" if plan.kind else "no structured tuning"
    samples = f", {_count(plan.num_samples, 'sample')}" if plan.num_samples else ""
    lines = [f"plan        {plan.model_name or 'model unnamed'}: rule {plan.rule}, {kind}{samples}"]
    of_all = ""
    if plan.backbone_numel:
        of_all = f", {_percent(plan.num_trainable, plan.backbone_numel)} of the backbone"
    lines.append(f"trained     {plan.num_trainable:,} of a budget of {plan.budget:,}{of_all}")
    matrices = sum(len(spec.rows) for spec in plan.structured.values())
    lines.append(f"structured  {plan.num_structured:,} in {_count(matrices, 'module')}")
    touched = sum(positions.numel() > 0 for positions in plan.unstructured.values())
    lines.append(f"single      {plan.num_unstructured:,} in {_count(touched, 'parameter tensor')}")
    if plan.head:
        sizes = [plan.info[name].numel for name in plan.head if name in plan.info]
        size = f"{sum(sizes):,} in " if len(sizes) == len(plan.head) else ""
        lines.append(f"head        {size}{', '.join(plan.head)} (trained besides, not counted)")
    return lines


def _cell(cell: Cell | None, kind: str | None) -> str:
    if cell is None:
        return ""
    if cell.structured and kind:
        return _WORDS[kind] + ("+" if cell.unstructured else "")
    return _short(cell.trainable) if cell.trainable else "-"


def _short(n: int) -> str:
    """A count in at most five characters; the title has the exact ones."""
    if n < 10_000:
        return f"{n:,}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if n < 99.95 * size:
            return f"{n / size:.1f}{unit}"
        if n < 999.5 * size:
            return f"{n / size:.0f}{unit}"
    return f"{n:.0e}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f}%" if share < 0.995 else f"{share:.1f}%" if share < 99.95 else "100%"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if share < 1 else f"{share:.1f} %"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n:,} {noun}s"


def _aligned(table: list[list[str]]) -> list[str]:
    n_columns = len(table[0])
    table = [row + [""] * (n_columns - len(row)) for row in table]
    widths = [max(len(row[column]) for row in table) for column in range(n_columns)]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
