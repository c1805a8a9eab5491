"""The text table of a plan: trained parameters by block and by operation."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping

from .cell import Cell

KINDS = {"lora": "LoRA", "adapter": "Adapter"}
_WORDS = {"lora": "LoRA", "adapter": "Adapt"}  # no wider than a number
WIDTH = 80  # columns of a terminal that was not asked
_GAP = "  "


def render(
    cells: Mapping[tuple[str, str], Cell], kind: str | None, width: int = WIDTH
) -> list[str]:
    """The lines of the table of `Plan.summary`, broken into several where it would be too wide.

    Args:
        cells: by (block, operation), as `Plan.cells` gives them.
        kind: of structured tuning, `"lora"`, `"adapter"` or None.
        width: most characters of a line.
    """
    blocks = list(dict.fromkeys(block for block, _ in cells))
    operations = ordered(operation for _, operation in cells)

    def total(of: Iterable[Cell]) -> int:
        return sum(cell.trainable for cell in of)

    whole = total(cells.values())
    table = [["block", *operations, "all", "share"]]
    for block in blocks:
        here = [cells.get((block, operation)) for operation in operations]
        trained = total(cell for cell in here if cell)
        texts = [_cell(cell, kind) for cell in here]
        table.append([block or "(no block)", *texts, _short(trained), _share(trained, whole)])
    columns = [
        total(cell for (_, own), cell in cells.items() if own == operation)
        for operation in operations
    ]
    table.append(["all", *map(_short, columns), _short(whole), _share(whole, whole)])
    table.append(["share", *(_share(column, whole) for column in columns), _share(whole, whole)])

    lines = _aligned(table, width)
    if kind and any(cell.structured for cell in cells.values()):
        word = _WORDS[kind]
        article = "an" if kind == "adapter" else "a"
        legend = [f"{word}: {article} {KINDS[kind]} in place of single parameters"]
        if any(cell.structured and cell.unstructured for cell in cells.values()):
            legend.append(f"{word}+: and single parameters besides")
        lines += [part for line in legend for part in wrapped(line, len(word) + 2, width)]
    return lines


def ordered(operations: Iterable[str]) -> list[str]:
    """Each operation once, matrices in the order they come, then biases and norms."""
    last = ("bias", "norm")
    seen = dict.fromkeys(operations)
    return [o for o in seen if o not in last] + [o for o in last if o in seen]


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


def percent(part: int, whole: int) -> str:
    """A share as the title tells it."""
    return percent_of(part / whole if whole else 0.0)


def percent_of(share: float) -> str:
    """A share from 0 to 1 as the title tells it."""
    return f"{100 * share:.2f} %" if share < 0.01 else f"{100 * share:.1f} %"


def count(n: int, noun: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{n} {noun}" if n == 1 else f"{n:,} {noun}s"


def in_numeric_order(names: Iterable[str]) -> list[str]:
    """Each name once, `blocks.2` before `blocks.10`, all else in the order in which it comes."""
    parts = {name: re.split(r"(\d+)", name) for name in dict.fromkeys(names)}
    first: dict[tuple[str, ...], int] = {}  # beginnings of names, by where they come first
    for place, split in enumerate(parts.values()):
        for end in range(1, len(split) + 1, 2):
            first.setdefault(tuple(split[:end]), place)

    def key(name: str) -> list[int]:
        split = parts[name]  # words and numbers take turns, so that like is compared with like
        return [int(p) if i % 2 else first[tuple(split[: i + 1])] for i, p in enumerate(split)]

    return sorted(parts, key=key)


def wrapped(line: str, indent: int, width: int) -> list[str]:
    """A line of prose as lines of at most `width`; what follows the first is indented."""
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _aligned(table: list[list[str]], width: int) -> list[str]:
    """The first column with as many of the others as fit, then with the next ones."""
    n_columns = len(table[0])
    table = [row + [""] * (n_columns - len(row)) for row in table]
    widths = [max(len(row[column]) for row in table) for column in range(n_columns)]
    parts: list[list[int]] = [[]]
    for column in range(1, n_columns):
        taken = [0, *parts[-1], column]
        if parts[-1] and sum(widths[c] for c in taken) + len(_GAP) * (len(taken) - 1) > width:
            parts.append([])
        parts[-1].append(column)
    lines: list[str] = []
    for part in parts:
        lines += [""] * bool(lines)
        lines += [
            _GAP.join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in part)]).rstrip()
            for row in table
        ]
    return lines
