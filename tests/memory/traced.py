"""What the allocator of a CPU was seen to do in a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def traced_peak(run: Callable[[], None], lasting: int, folder: Path) -> int:
    """Most bytes at a time while something runs, with `lasting` that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    trace.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    live = highest = lasting
    for _, change in changes:
        live += change
        highest = max(highest, live)
    return highest
