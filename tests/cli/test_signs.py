"""Signs that a terminal has not, and names that are no text, cost no result."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spt_kernels import cli
from spt_kernels.cli.app import run
from tests.cli.test_commands import SHAPE
from tests.finetuning.pictures_on_disk import write_weights
from tests.finetuning.undrawn import draw_nothing

CAFE = os.fsdecode(b"caf\xe9")  # as an older disk has it


@pytest.mark.parametrize(
    "encoding",
    ["ascii", "ascii:surrogateescape"],  # the latter of the locale C without UTF-8 mode
)
def test_a_terminal_without_a_sign_gets_another(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spt_kernels", "finetune", "--help"],
        env={**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"linear" in done.stdout
    assert b"?" in done.stdout


def test_a_drawing_without_its_signs_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    arguments = ["memory", "-m", "resnet10t", "--method", "linear", "-q"]
    monkeypatch.setattr(sys, "argv", ["spt-kernels", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert b"linear" in written.getvalue()
    assert b"?" in written.getvalue()


def test_names_that_are_no_text_are_kept_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    for split in ("train", "test"):
        for name, count in ((CAFE, 1), ("tea", 3)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for place in range(count):
                with open(folder / f"{place}.png", "wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
    write_weights(tmp_path / "base.safetensors")
    model = ["-m", "vit_tiny_patch16_224", *SHAPE, "-w", str(tmp_path / "base.safetensors")]
    output, table = tmp_path / "run", tmp_path / "seen.csv"
    arguments = ["finetune", *model, "-d", str(tmp_path / "data"), "-o", str(output)]
    assert run([*arguments, "--method", "linear", "--epochs", "1", "-q", "--json"]) == 0
    log = (output / "log.txt").read_text(errors="surrogateescape")
    assert f"a single training image of {CAFE}" in log
    assert run(["evaluate", str(output), "-q", "--json"]) == 0
    test = str(tmp_path / "data" / "test")
    assert run(["predict", str(output), test, "--csv", str(table), "-q", "--json"]) == 0
    with open(table, errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["image"]).parent.name for row in rows} == {CAFE, "tea"}
    assert {row["class"] for row in rows} == {CAFE, "tea"}
