"""Writes the README's tables from committed results, so that no figure is ever typed in.

`make report` runs it; `python -m bench.report --check` fails when the README is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DEMO = ROOT / "docs" / "demo" / "result.json"


def demo_table(result: dict[str, Any]) -> str:
    """The demo's rows as a Markdown table, with what became of the task file below."""
    rows = [
        (
            row["method"],
            f"{row['trained_parameters']:,}",
            f"{100 * row['mean_accuracy']:.1f} ± {100 * row['spread']:.1f}",
            f"{row['step_ms']:.1f}",
            f"{row['accounted_peak_bytes'] / 2**20:.1f}",
            f"{row['task_bytes'] / 2**10:.1f}",
        )
        for row in result["rows"]
    ]
    titles = ("method", "trained", "accuracy, %", "step, ms", "peak, MiB", "file, KiB")
    lines = [titles, ("---",) + ("---:",) * (len(titles) - 1), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    check, seeds = result["check"], len(result["rows"][0]["accuracies"])
    layers = "the plain model's" if check["has_plain_layers"] else "not the plain model's"
    same = f"{check['same_after_loading']} of {check['images']} predictions as before"
    return (
        f"{table}\n\n"
        f"Mean ± standard deviation of {seeds} seeds on {check['images']} unseen images. The head "
        "is trained in every row and not counted.\n"
        "Peak memory is accounted, not measured; the file of `full` is the whole model. Loaded "
        f"onto a fresh base model,\nthe task file gives {same}; merged, "
        f"{check['same_after_merging']}, and the layers are {layers}."
    )


def rendered(readme: str) -> str:
    """The README with its generated parts made anew."""
    table = demo_table(json.loads(DEMO.read_text()))
    pattern = r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", readme, flags=re.DOTALL)


def main() -> int:
    """Write the README, or with `--check` only compare."""
    before = README.read_text()
    after = rendered(before)
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
