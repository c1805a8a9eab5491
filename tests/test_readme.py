"""The README's own Python block and shell lines, run as they stand."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.report import TEXTS, newest_cpu_results, parts, rendered
from spt_kernels import methods
from spt_kernels.cli import app
from spt_kernels.costs.results import TABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 3), ("test", 1)):
        for name in ("daisy", "tulip"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    model = timm.create_model("vit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path


def test_python_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert (tmp_path / "flowers.safetensors").stat().st_size > 0
    assert type(names["model"].blocks[0].attn.qkv).__name__ == "Linear"


@pytest.mark.slow
def test_shell_lines(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    lines = [c for block in blocks("sh") for c in commands(block) if c.startswith("spt-kernels")]
    assert len(lines) == 6
    for line in lines:
        if line.startswith("spt-kernels memory"):
            continue  # its output is held against the README's
        assert app.run(shlex.split(line)[1:]) == 0, line
    assert (photos / "runs" / "photos" / "task.safetensors").exists()
    assert (photos / "merged.safetensors").exists()


@pytest.mark.slow
def test_output_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"^(spt-kernels memory .*)\n```\n\n```\n(.*?)^```", README, re.M | re.S)
    assert found is not None
    command, every = found.groups()
    assert max(len(line) for line in every.splitlines()) <= 80
    # a row takes as long whatever the others are
    some = ["linear", "adapter-8", "spt-lora"]
    assert app.run([*shlex.split(command)[1:], "--method", ",".join(some), "-q"]) == 0
    out = capsys.readouterr().out
    names = [row.split()[:1] for row in every.splitlines()]
    others = [name for name in itertools.chain(*names) if name in methods and name not in some]
    assert len(others) > 10
    shown = "\n".join(r for r in every.splitlines() if not set(others).intersection(r.split()[:1]))
    number = r"\d[\d,]*\.?\d*"
    words = [re.sub(r"[█▓▒░· ]+", " ", re.sub(number, "", text)).split() for text in (shown, out)]
    assert words[0] == words[1]
    figures = [
        [float(figure.replace(",", "")) for figure in re.findall(number, text)]
        for text in (shown, out)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=0.01, abs=1)  # versions of torch differ


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    guides = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = {c.split()[1] for c in re.findall(r"^make \w+", guides, re.MULTILINE)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"


def test_links_point_somewhere() -> None:
    prose = re.sub(r"`[^`\n]*`", "", README)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), f"README links to {target}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(path: Path) -> None:
    text = path.read_text()
    tables = parts(newest_cpu_results(TABLES), newest_cpu_results("contests"))
    assert rendered(text, tables) == text, "run `make report`"
