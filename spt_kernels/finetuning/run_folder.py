"""The output folder of one run: the names of its files, and whether it may be written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically

FILES = {
    "config": "config.json",
    "sensitivity": "sensitivity.safetensors",
    "plan": "plan.safetensors",
    "checkpoint": "checkpoint.pt",
    "metrics": "metrics.jsonl",
    "task": "task.safetensors",
    "trained": "trained.safetensors",
    "model": "model.safetensors",
    "predictions": "predictions.jsonl",
    "result": "result.json",
    "sensitivity_picture": "sensitivity.png",
    "curves_picture": "curves.png",
}


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes. `FILES` names the files."""

    path: Path

    def __getitem__(self, name: str) -> Path:
        return self.path / FILES[name]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, resume: bool = False, force: bool = False
    ) -> RunFolder:
        """Make the folder, or check that an existing one may be written to.

        Args:
            path: the folder.
            resume: go on with what is in it.
            force: whatever an earlier run left in it; `clear` removes that.

        Raises:
            ValueError: it is not empty and neither `resume` nor `force`, or cannot be written to.
        """
        folder = cls(Path(path))
        if resume and force:
            raise ValueError("resume, force: expected one of them, got both")
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            if not (resume or force) and any(folder.path.iterdir()):
                raise ValueError(
                    f"output: {folder.path} is not empty (resume goes on, force overwrites)"
                )
            probe = folder.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"output: cannot write to {folder.path} ({error.strerror or error})"
            ) from error
        return folder

    def clear(self) -> None:
        """Remove the files of an earlier run; files of any other name stay."""
        for name in FILES:
            self[name].unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomically(self[name], (json.dumps(value, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file, `None` if it is not there; `ValueError` if it is damaged."""
        if not self[name].is_file():
            return None
        try:
            value = json.loads(self[name].read_text())
        except ValueError as error:
            raise ValueError(f"{self[name]}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self[name]}: expected a JSON object")
        return value

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a file of JSON lines, whole or not at all."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self[name], text.encode())

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read a file of JSON lines."""
        return [json.loads(line) for line in self[name].read_text().splitlines()]
