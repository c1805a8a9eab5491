"""Every script in examples/ runs as its `--smoke` does, leaves a task, and stays short."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spt_kernels as spt
from spt_kernels.finetuning.demo import one_thread
from tests.docs.pages import EXAMPLES, ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What accelerate and its like set is taken back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def tell_of_one_process() -> None:
    """What torchrun tells the only process there is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(place)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("transformers", "accelerate"):
        if f"from {needed} " in path.read_text():
            pytest.importorskip(needed)
    if path.stem == "data_parallel":
        tell_of_one_process()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    serves = path.stem == "serve_tasks"
    output = tmp_path if serves else tmp_path / "task.safetensors"
    with one_thread():
        main = runpy.run_path(str(path))["main"]
        main(["--smoke", "--output", str(output)])
    printed = capsys.readouterr().out
    if serves:
        assert printed.count("the same after other tasks: True") == 2
    else:
        assert f"{output}: {output.stat().st_size:,} bytes" in printed
        assert isinstance(spt.read_metadata(output), dict)  # which checks all of the file


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_short_and_told_of(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    assert f"| `{path.name}` |" in EXAMPLES.read_text()


def test_there_are_five() -> None:
    assert len(SCRIPTS) == 5
