"""Which machine and which code this is: what a measured figure is worth nothing without."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import __version__, native


@dataclass(frozen=True)
class Machine:
    """Hardware and versions.

    Attributes:
        processor: the CPU or the card.
        threads: that torch uses; 0 on a card.
        instruction_set: of the C++ kernels.
        versions: of everything that a time depends on.
    """

    processor: str
    threads: int
    instruction_set: str
    versions: dict[str, str]

    def file_name(self) -> str:
        """One results file per machine and version of this package."""
        threads = f"{self.threads} threads" if self.threads else ""
        words = f"{self.processor} {threads} {self.versions['spt_kernels']}".lower()
        return "-".join(re.findall(r"[a-z0-9.]+", words)) + ".json"


def describe(device: torch.device) -> Machine:
    """This machine."""
    versions = {
        "spt_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        return Machine(torch.cuda.get_device_name(device), 0, "", versions)
    known = native.available()
    return Machine(
        _cpu_name(), torch.get_num_threads(), native.instruction_set() if known else "", versions
    )


def commit() -> str:
    """The commit that runs, with a `+` when the tree has other changes than results.

    Empty where the package is installed rather than run from its checkout.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    head = _git(root, "rev-parse", "--short=10", "HEAD")
    changed = _git(
        root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"
    )
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    facts: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    # cloud machines hide the model's number, not its family
    family, model = facts.get("cpu family", "?"), facts.get("model", "?")
    return f"{facts['model name']} family {family} model {model}"
