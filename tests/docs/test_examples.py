"""Every script in examples/ runs as its `--smoke` does, leaves a task, and stays short."""

from __future__ import annotations

import os
import runpy
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import spt_kernels as spt
from spt_kernels.finetuning.demo import one_thread
from tests.docs.pages import EXAMPLES, ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells the only process there is; what a script sets is taken back."""
    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    yield
    for name in os.environ.keys() - before.keys() - told.keys() - {"MASTER_ADDR"}:
        del os.environ[name]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("transformers", "accelerate"):
        if f"from {needed} " in path.read_text():
            pytest.importorskip(needed)
    if path.stem != "data_parallel":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
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
