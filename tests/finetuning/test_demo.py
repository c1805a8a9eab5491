"""The demo, shortened: what it leaves on disk and what it claims about the task file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from bench import demo
from spt_kernels.finetuning import ModelSource, build
from spt_kernels.finetuning.demo import (
    ARCHITECTURE,
    BASE,
    NEW,
    RECIPE,
    SHAPE,
    DemoResult,
    run_demo,
)
from spt_kernels.finetuning.images.digits import write_digits

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent.parent


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


def test_the_base_model_comes_with_the_package(shown: tuple) -> None:
    folder, result = shown
    weights = load_file(BASE)
    plain = build(ModelSource(ARCHITECTURE, SHAPE), 5).model.state_dict()
    assert {name: t.shape for name, t in weights.items()} == {n: t.shape for n, t in plain.items()}
    assert BASE.stat().st_size < 300_000
    assert (folder / "base.safetensors").read_bytes() == BASE.read_bytes()
    assert result.base_accuracy > 0.95
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-data"]["spt_kernels"]
    assert f"finetuning/{BASE.name}" in named


def test_the_committed_run_shows_what_the_readme_says() -> None:
    """Tuning 5 % of the model is near full tuning and beyond the head alone, in every seed."""
    committed = demo.read(demo.DEMO / "result.json")
    rows = {row.method: row for row in committed.rows}
    ours, full, linear = rows["spt-lora"], rows["full"], rows["linear"]
    margin = demo.TOLERANCE / 100
    assert ours.mean > linear.mean + 2 * margin, "whatever the processor"
    assert ours.mean > full.mean - margin
    assert min(ours.accuracies) > max(linear.accuracies)
    assert demo.differences(committed, committed) == []
    worse = replace(ours, accuracies=tuple(a - 1.5 * margin for a in ours.accuracies))
    changed = tuple(worse if row is ours else row for row in committed.rows)
    [difference] = demo.differences(replace(committed, rows=changed), committed)
    assert difference.startswith("spt-lora: accuracy")


def test_the_task_file_does_what_the_demo_says(shown: tuple) -> None:
    check = shown[1].check
    assert check.images == check.same_after_loading == check.same_after_merging > 400
    assert check.has_plain_layers


def test_its_figures_and_pictures_are_kept(shown: tuple) -> None:
    folder, result = shown
    assert json.loads((folder / "result.json").read_text()) == json.loads(
        json.dumps(result.to_json())
    )
    assert DemoResult.from_json(result.to_json()) == result
    for picture in ("curves.png", "spt-lora-0/sensitivity.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
