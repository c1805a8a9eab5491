"""The demo, shortened: what it leaves on disk and what it claims about the task file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from spt_kernels.finetuning import ModelSource, build
from spt_kernels.finetuning.demo import ARCHITECTURE, NEW, RECIPE, SHAPE, run_demo
from spt_kernels.finetuning.digits import write_digits


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("demo")
    recipe = replace(RECIPE, epochs=2)
    return folder, run_demo(folder, seeds=(0,), recipe=recipe, processes=1)


def test_every_digit_is_written_once(tmp_path: Path) -> None:
    written = write_digits(tmp_path, NEW, test_share=0.5)
    expected = int((load_digits().target >= 5).sum())
    assert written == expected == len(list(tmp_path.rglob("*.png")))
    assert {path.name for path in (tmp_path / "train").iterdir()} == set("56789")


def test_lora_and_spt_lora_train_as_many_parameters(shown: tuple) -> None:
    rows = {row.method: row for row in shown[1].rows}
    assert list(rows) == ["linear", "lora", "spt-lora", "full"]
    width, depth = SHAPE["embed_dim"], SHAPE["depth"]
    assert rows["lora"].trained_parameters == depth * 2 * 8 * (width + width)
    assert rows["spt-lora"].trained_parameters == rows["lora"].trained_parameters
    model = build(ModelSource(ARCHITECTURE, SHAPE), 5).model
    head = 5 * width + 5
    assert rows["full"].trained_parameters == sum(p.numel() for p in model.parameters()) - head
    assert rows["linear"].trained_parameters == 0


def test_the_task_file_does_what_the_demo_says(shown: tuple) -> None:
    check = shown[1].check
    assert check.images == check.same_after_loading == check.same_after_merging > 400
    assert check.has_plain_layers


def test_its_figures_and_pictures_are_kept(shown: tuple) -> None:
    folder, result = shown
    assert json.loads((folder / "result.json").read_text()) == json.loads(
        json.dumps(result.to_json())
    )
    for picture in ("curves.png", "spt-lora-0/sensitivity.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
