"""Results on disk: one JSON file per machine and version, each entry with its date and commit.

A file holds `machine`, and parts of named entries: `tables` (cost tables, by what they were
measured at) and what benches add. New entries replace those of the same name and leave the others.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import write_atomically
from .machine import Machine, commit, describe
from .setting import CostSetting
from .table7 import Table7

TABLES = "tables"


def add(
    folder: Path,
    machine: Machine,
    part: str,
    entries: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Add entries to the machine's file and return its path.

    Args:
        folder: made if it is missing.
        machine: names the file.
        part: `"tables"`, or what a bench calls its own.
        entries: by name; each gets today's `date` and the `commit`.
        about: more of the machine, kept beside the parts.
    """
    path = folder / machine.file_name()
    kept = read(path) if path.exists() else {}
    when = {"date": datetime.date.today().isoformat(), "commit": commit()}
    new = {name: dict(entry) | when for name, entry in entries.items()}
    kept[part] = dict(sorted((kept.get(part, {}) | new).items()))
    kept |= {"machine": asdict(machine), **(about or {})}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(kept, indent=1, ensure_ascii=False)}\n".encode())
    return path


def add_table(folder: Path, table: Table7) -> Path:
    """Add a cost table, in place of the one at the same sizes and precision."""
    machine = describe(torch.device(table.setting.device))
    return add(folder, machine, TABLES, {table.setting.title(): table.to_json()})


def known_table(folder: Path, setting: CostSetting) -> Table7 | None:
    """The folder's cost table of this machine, commit and setting, if it has one.

    Raises:
        ValueError: what is there is no file of results.
    """
    path = folder / describe(torch.device(setting.device)).file_name()
    found = read(path).get(TABLES, {}).get(setting.title()) if path.exists() else None
    table = Table7.from_json(found) if found and found["commit"] == commit() else None
    # rounds are no part of the title
    return table if table is not None and table.setting == setting else None


def read(path: Path) -> dict[str, Any]:
    """What is known of one machine and version.

    Raises:
        ValueError: not a file of results.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON results, got {error}") from error
    if not isinstance(found, dict) or "machine" not in found:
        raise ValueError(f"{path}: expected results with a machine, got another JSON")
    return found
