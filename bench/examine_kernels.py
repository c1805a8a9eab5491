"""Prints what every shipped kernel takes and does on a card, from its compiled code, without one.

`python -m bench.examine_kernels [--arch sm_90] [--json FILE] [kernels file ...]`
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from rich.console import Console
from rich.table import Table

from spt_kernels.kernels.card import CAPABILITIES

from .compilation import Compiled, Failure, Key, compile_all, kernel_files, keys_of


def examine(files: list[str], capabilities: list[int]) -> Mapping[Key, Compiled | Failure]:
    """Every shipped variant of these kernels files, compiled for these cards."""
    return compile_all(keys_of(files, capabilities))


def table_of(found: Mapping[Key, Compiled | Failure], capability: int) -> Table:
    """The variants on one card, a row each."""
    table = Table(title=f"sm_{capability}", title_justify="left", box=None, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for title in ("regs", "spill B", "smem B", "loads, bits", "stores, bits"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("tensor cores", no_wrap=True)
    table.add_column("async", justify="right")
    table.add_column("fences", justify="right")
    table.add_column("programs/SM", justify="right")
    table.add_column("occupancy", justify="right")
    table.add_column("limited by")
    for (file, name, card), result in found.items():
        if card == capability:
            table.add_row(f"{file}: {name}", *_cells(result))
    return table


def _cells(result: Compiled | Failure) -> list[str]:
    if isinstance(result, Failure):
        return [f"failed: {result.message.splitlines()[0]}"]
    code = result.code
    copies = "TMA" if code.tma_copies else str(code.async_copies or "")
    return [
        str(code.registers),
        str(code.local_bytes or ""),
        f"{result.shared_bytes:,}",
        _widths(code.loads),
        _widths(code.stores),
        ", ".join(sorted({operation.split(".F32")[0] for operation in code.tensor_core})),
        copies,
        str(code.fences or ""),
        str(result.resident),
        f"{result.occupancy:.0%}",
        result.limited_by,
    ]


def _widths(counts: Mapping[int, int]) -> str:
    """`128 ×4, 32 ×2`: how many instructions move so many bits a thread."""
    return ", ".join(f"{bits} ×{count}" for bits, count in counts.items())


def as_json(found: Mapping[Key, Compiled | Failure]) -> dict[str, Any]:
    """Everything found, with the versions that compiled it."""
    import torch
    import triton

    rows = [
        {"kernel": file, "variant": name, "arch": f"sm_{capability}", **asdict(result)}
        for (file, name, capability), result in found.items()
    ]
    return {"torch": torch.__version__, "triton": triton.__version__, "variants": rows}


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 when a variant failed to compile or spills."""
    parser = argparse.ArgumentParser(prog="python -m bench.examine_kernels", description=__doc__)
    names = [f"sm_{capability}" for capability in CAPABILITIES]
    parser.add_argument("--arch", action="append", choices=names, help="only this card (repeat)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found as JSON")
    parser.add_argument("files", nargs="*", metavar="KERNELS", help="only these kernels files")
    options = parser.parse_args(arguments)
    if unknown := set(options.files) - set(kernel_files()):
        parser.error(f"unknown kernels file: {', '.join(sorted(unknown))}")

    capabilities = [int(name.removeprefix("sm_")) for name in options.arch or names]
    found = examine(options.files or kernel_files(), capabilities)

    console = Console()
    if not console.is_terminal:  # a file has no width to fit into
        console = Console(width=200)
    for capability in capabilities:
        console.print(table_of(found, capability))
        console.print()
    if options.json:
        options.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    return int(any(isinstance(r, Failure) or r.code.local_bytes > 0 for r in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
