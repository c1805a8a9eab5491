"""The text table of a plan: trained parameters by block and by operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Cell, Plan

_KINDS = {"lora": "LoRA", "adapter": "Adapter"}


def render(plan: Plan) -> str:
    """The summary that `Plan.summary` returns."""
    cells = plan.cells()
    blocks = list(dict.fromkeys(block for block, _ in cells))
    operations = ordered(operation for _, operation in cells)
    mark = f" {_KINDS[plan.kind][0]}" if plan.kind else ""

    def row(title: str, of_row: list[tuple[str, Cell]], mark: str = mark) -> list[str]:
        by_operation: dict[str, list[Cell]] = {}
        for operation, cell in of_row:
            by_operation.setdefault(operation, []).append(cell)
        texts = [_cell(by_operation.get(operation, []), mark) for operation in operations]
        trained = sum(cell.trainable for _, cell in of_row)
        return [title, *texts, f"{trained:,}", _percent(trained, plan.num_trainable)]

    table = [["block", *(operation + " " * len(mark) for operation in operations), "all", "share"]]
    for block in blocks:
        here = [(operation, cell) for (place, operation), cell in cells.items() if place == block]
        table.append(row(block or "(no block)", here))
    every = [(operation, cell) for (_, operation), cell in cells.items()]
    table.append(row("all", every, " " * len(mark)))
    shares = [
        _percent(sum(c.trainable for (_, o), c in cells.items() if o == op), plan.num_trainable)
        for op in operations
    ]
    table.append(["share", *(share + " " * len(mark) for share in shares), "100 %", ""])

    lines = _title(plan)
    lines += ["", "trained parameters by block and operation", *_aligned(table)]
    if plan.kind:
        lines.append(f"{mark.strip()} = {_KINDS[plan.kind]}, in place of single parameters")
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


def _cell(cells: list[Cell], mark: str) -> str:
    trainable = sum(cell.trainable for cell in cells)
    structured = any(cell.structured for cell in cells)
    text = f"{trainable:,}" if trainable else "-" if cells else ""
    return text + (mark if structured else " " * len(mark))


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if share < 1 else f"{share:.1f} %"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n:,} {noun}s"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
