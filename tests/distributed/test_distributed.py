"""What two and four processes do together is what one does: the checks of this folder."""

from __future__ import annotations

import ast
import json
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

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.distributed.launch", str(folder)]
    # what a process that died would leave the others waiting for ends with their own time
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_in_processes(name: str, size: int, results: Path) -> None:
    for rank in range(size):
        found = json.loads((results / f"{size}-{rank}.json").read_text())
        if [*found.values()][-1] is None and name not in found:
            pytest.skip(f"not meant for {size} processes")
        assert name in found, f"process {rank} did not come to it: {[*found.values()][-1]}"
        assert found[name] is None, f"process {rank}: {found[name]}"
