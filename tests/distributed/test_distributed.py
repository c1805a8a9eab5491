"""What two and four processes do together is what one does: the checks of this folder."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

# not imported: that would load here what the processes are to load
LAUNCH = Path(__file__).with_name("launch.py")
FILES = sorted(p for p in LAUNCH.parent.glob("check_*.py"))
NAMES = [
    f"{path.stem.removeprefix('check_')}: {node.name.removeprefix('check_')}"
    for path in FILES
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and hasattr(os, "fork")), reason="needs torch.distributed and fork"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.distributed.launch", str(folder)]
    # those that wait for a process that has died give up sooner than this
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_in_processes(name: str, results: Path) -> None:
    sizes = []
    for size in (2, 4):
        found = [json.loads((results / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        for rank, own in enumerate(found):
            assert own.get(name) is None, f"process {rank} of {size}: {own[name]}"
            if name in own:
                sizes.append(size)
            elif own:  # it is not meant for so many, unless what came before it failed
                ended = [*own.values()][-1]
                assert ended is None, f"process {rank} of {size} did not come to it: {ended}"
    assert sizes, "it ran in some"
