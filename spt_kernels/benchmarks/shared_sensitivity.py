"""The sensitivity that several runs of a task share: measured by the first, taken by the others.

Whether it is what a run would measure itself, to the last bit, the run decides when it finds the
files in its folder (`finetuning.measured`); if not, it measures anew. So a wrong one does no harm.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..finetuning.folder.run_folder import RunFolder
from ..finetuning.job.job import FinetuneJob

SHARED = "sensitivity"  # the folder in a task's that holds one for each that runs share
_FILES = ("sensitivity", "measured")  # in this order: the second says what the first is


def store_of(job: FinetuneJob, task_folder: Path) -> RunFolder | None:
    """Where runs that measure the same as `job` keep it; `None` if it measures nothing."""
    return stored_for(job.to_json(), task_folder) if job.method.is_sensitivity_aware else None


def stored_for(job: Mapping[str, Any], task_folder: Path) -> RunFolder:
    """The same of a job that measures, as its `config.json` tells it."""
    method, recipe = job["method"], job["recipe"]
    shared = {name: job[name] for name in ("model", "images", "form")}
    measured = (method["samples"], method["head"], recipe["batch_size"], recipe["seed"])
    text = json.dumps([shared, measured], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return RunFolder(task_folder / SHARED / digest)


def take(store: RunFolder, folder: RunFolder) -> None:
    """Put what `store` holds into the folder of a run that has not begun."""
    begun = any(folder[name].is_file() for name in ("config", *_FILES))
    if not begun and all(store[name].is_file() for name in _FILES):
        _link(store, folder)


def give(folder: RunFolder, store: RunFolder) -> None:
    """Put what a run measured into `store`, unless it is from there."""
    if not all(folder[name].is_file() for name in _FILES):
        return
    own, there = folder["sensitivity"], store["sensitivity"]
    if not (there.is_file() and os.path.samefile(own, there)):
        _link(folder, store)


def _link(source: RunFolder, target: RunFolder) -> None:
    """Hard links, as such files are large and never written into; copies where links cannot be."""
    target.path.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        temporary = target.path / f".{secrets.token_hex(8)}.tmp"
        try:
            os.link(source[name], temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source[name], temporary)
        os.replace(temporary, target[name])
