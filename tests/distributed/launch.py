"""Runs every check of this folder in two and in four processes, which are forked from this one.

A process costs seconds to start, most of them for importing torch: that is done once, and many
checks run in the same few processes. `python -m tests.distributed.launch FOLDER` leaves what came
of each in `FOLDER/<size>-<rank>.json`: name of a check -> None, or why it failed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SIZES = (2, 4)
# what is imported when it is first used: once here, not in each process
LATE = ("torch._dynamo", "matplotlib.figure", "torch.distributed.fsdp")
FILES = (
    *("primitives", "sensitivity", "top_tau", "data_parallel", "quantized"),
    *("documentation", "finetuning"),
)
_PREFIX = "check_"


def checks(size: int) -> dict[str, Callable[[Path], None]]:
    """Name -> a function that each of so many processes calls with a folder that they share."""
    found = {}
    for file in FILES:
        module = importlib.import_module(f"tests.distributed.{_PREFIX}{file}")
        for name, value in vars(module).items():
            if not name.startswith(_PREFIX) or value.__module__ != module.__name__:
                continue
            if size in getattr(value, "sizes", getattr(module, "SIZES", SIZES)):
                found[f"{file}: {name.removeprefix(_PREFIX)}"] = value
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in LATE:
        importlib.import_module(name)
    for size in SIZES:
        every = checks(size)
        place = folder / str(size)
        place.mkdir()
        gc.freeze()  # no process goes through what is imported, which would copy it, too
        children = []
        for rank in range(size):
            child = os.fork()
            if not child:
                _run(every, rank, size, place)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


def _run(every: dict[str, Callable[[Path], None]], rank: int, size: int, place: Path) -> None:
    """Run all checks, up to the first that fails, and leave the process."""
    found: dict[str, str | None] = {}
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(place / "store"), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        for name, check in every.items():
            began = time.process_time()
            found[name] = "it did not end"
            check(place)
            found[name] = None
            if "--times" in sys.argv and rank == 0:
                print(f"{size}: {name}: {time.process_time() - began:.2f} s", file=sys.stderr)
        dist.destroy_process_group()
    except BaseException:
        found[list(found)[-1]] = traceback.format_exc()
    finally:
        (place.parent / f"{size}-{rank}.json").write_text(json.dumps(found))
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
