"""Which of timm's families work: `python -m bench.model_families` writes docs/MODELS.md.

Each family's smallest model is walked through by `bench.model_walk`, in a process of its own with a
limit of time, at low priority. What came of it is kept in bench/results/models/families.json after
each family, so a run that was ended goes on (`--again` begins afresh).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm

from spt_kernels.finetuning.base.weight_file import first_line

from . import model_walk
from .markdown import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "models" / "families.json"
PAGE = ROOT / "docs" / "MODELS.md"
LIMIT_S = 300.0
_PACKAGES = ("spt_kernels", "torch", "timm")

_OPENING = """# Which models work

Written by `make models`, never by hand. The smallest model of each of timm's families, with random
weights and images as small as it takes, is measured, allocated (0.5 %, LoRA of rank 4), tuned for
one step, saved, and loaded onto a fresh base model, which must then give the same outputs to the
bit, on a CPU. The other models of a family are made of much the same layers.

* **tunable**: share of the backbone's parameters that sensitivities are measured of and the budget
  may go to. The rest is the stem, tokens and tables; those can be added with `include`.
* **LoRA**, **entries**: matrices that became structured, and tensors of which single entries are
  trained.
* **one by one**: tensors whose sensitivity has no fused kernel and is measured exactly but slowly,
  one sample at a time.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Walk through the families and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", help="of timm.list_modules() [all of them]")
    parser.add_argument("--again", action="store_true", help="also those walked through before")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help=f"each [{LIMIT_S:.0f}]")
    parser.add_argument("--page", action="store_true", help="write the page alone, run nothing")
    options = parser.parse_args(arguments)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    for family in () if options.page else options.families or timm.list_modules():
        if family in rows and not (options.again or options.families):
            continue
        rows[family] = walked(family, options.limit_s)
        print(f"{family}: {rows[family].get('reason', 'works')}", flush=True)
        text = json.dumps({"rows": dict(sorted(rows.items()))}, indent=1)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(text + "\n")
    PAGE.write_text(page(rows, timm.list_modules()))


def walked(family: str, limit_s: float) -> dict[str, Any]:
    """The row of a family; where it failed, with the reason and how far it came."""
    context = multiprocessing.get_context("fork")  # torch and timm are imported once
    ours, theirs = context.Pipe()
    process = context.Process(target=_walk_and_send, args=(family, theirs))
    process.start()
    theirs.close()
    until = time.monotonic() + limit_s
    row: dict[str, Any] = {"reason": f"not done after {limit_s:.0f} s"}
    try:
        while ours.poll(max(until - time.monotonic(), 0)):
            row = {"reason": row["reason"], **ours.recv()}
            if row.pop("done", False):
                break
    except EOFError:  # no more will come
        process.join()
        row["reason"] = f"the process ended with {process.exitcode}"
        if process.exitcode == -signal.SIGKILL:
            row["reason"] += ", as at the end of the machine's memory"
    process.kill()
    process.join()
    if row["reason"] is None:
        del row["reason"]
    return {**row, "versions": {name: version(name) for name in _PACKAGES}}


def _walk_and_send(family: str, connection: Connection) -> None:
    os.nice(10)
    told: dict[str, Any] = {}

    def tell(row: dict[str, Any]) -> None:
        told.update(row)
        connection.send(row)

    try:
        connection.send({**model_walk.walk(family, tell), "reason": None, "done": True})
    except Exception as error:  # whatever it is, it is what came of this family
        reason = f"{type(error).__name__}: {first_line(error)}"
        connection.send({**told, "reason": reason, "done": True})


def page(rows: Mapping[str, Mapping[str, Any]], families: Sequence[str]) -> str:
    """docs/MODELS.md: what works as one table, what does not as another, and what is not known."""
    good = {family: row for family, row in rows.items() if "reason" not in row}
    bad = {family: row for family, row in rows.items() if "reason" in row}
    titles = ("family", "smallest model", "images", "parameters", "tunable", "LoRA", "entries")
    table = markdown((*titles, "one by one"), [_cells(f, row) for f, row in sorted(good.items())])
    versions = sorted({_said(row["versions"]) for row in rows.values()})
    parts = [_OPENING, f"{len(good)} of {len(rows)} families work ({'; '.join(versions)}).", table]
    if bad:
        titles = ("family", "smallest model", "stage", "reason")
        lines = [
            (
                family,
                row.get("model", "–"),
                row.get("stage", "–"),
                row["reason"].replace("|", "\\|"),
            )
            for family, row in sorted(bad.items())
        ]
        parts += ["## Those that do not, and why", markdown(titles, lines)]
    unknown = [family for family in families if family not in rows]
    if unknown:
        parts += ["## Not walked through yet", ", ".join(unknown)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cells(family: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        family,
        f"`{row['model']}`",
        f"{row['image']}²",
        f"{row['parameters'] / 1e6:.1f} M",
        f"{100 * row['candidates'] / row['backbone']:.0f} %",
        str(row["structured"]),
        str(row["unstructured"]),
        str(row["one_by_one"]) if row["one_by_one"] else "none",
    )


def _said(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


if __name__ == "__main__":
    main()
