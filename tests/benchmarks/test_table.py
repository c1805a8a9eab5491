"""Means over seeds, tasks and groups against numbers by hand; what is missing is never averaged."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.benchmarks import BenchmarkSetting, BenchmarkTask, benchmark_figure
from spt_kernels.benchmarks import benchmark_table as read
from spt_kernels.benchmarks.piece import write_setting
from spt_kernels.benchmarks.table_text import group_grid, markdown, notes, task_grid
from spt_kernels.finetuning import ImageSource, Method, ModelSource
from tests.pictures import assert_nothing_is_cut

# method -> task -> accuracy of each seed
ACCURACIES = {
    "full": {"a": (0.5, 0.6), "b": (0.7, 0.9), "c": (0.2, 0.4)},
    "spt-lora": {"a": (0.6, 0.8), "b": (0.8, 0.8), "c": (0.35, 0.25)},
}
GROUPS = {"a": "Near", "b": "Near", "c": "Far"}


def result(accuracy: float, trained: int) -> dict[str, Any]:
    return {
        **{"test_accuracy": accuracy, "val_accuracy": None, "seconds": 2.5},
        **{"trained_parameters": trained, "backbone_parameters": 1_000_000},
        **{"device": "cpu", "threads": 2, "versions": {"spt_kernels": "1", "torch": "2"}},
    }


def setting_of(methods: dict[str, Any], tasks: dict[str, str] = GROUPS) -> BenchmarkSetting:
    images = ImageSource("photos")
    made = [BenchmarkTask(n, n.upper(), group, images, images) for n, group in tasks.items()]
    source = ModelSource("vit", weights="w.safetensors")
    return BenchmarkSetting("Suite", source, tuple(made), tuple(map(Method, methods)), (0, 1))


def write(output: Path, accuracies: dict[str, Any], tasks: dict[str, str] = GROUPS) -> Path:
    """A folder as a benchmark leaves it."""
    output.mkdir()
    write_setting(output, setting_of(accuracies, tasks))
    for method, by_task in accuracies.items():
        for task, values in by_task.items():
            for seed, accuracy in enumerate(values):
                if accuracy is not None:
                    folder = output / task / method / f"seed{seed}"
                    folder.mkdir(parents=True)
                    trained = 1_000_000 if method == "full" else 4_000 + 2_000 * seed
                    (folder / "result.json").write_text(json.dumps(result(accuracy, trained)))
    return output


def test_means_are_of_seeds_then_tasks_then_groups(tmp_path: Path) -> None:
    table = read(write(tmp_path / "x", ACCURACIES))
    full, ours = table.rows
    assert full.tasks["a"].mean == pytest.approx(0.55)
    assert full.tasks["a"].standard_error == pytest.approx(0.05)  # 0.0707 / √2
    # seed by seed: (0.5 + 0.7) / 2 and (0.6 + 0.9) / 2
    assert full.groups["Near"].by_seed == pytest.approx({0: 0.6, 1: 0.75})
    assert full.groups["Near"].standard_error == pytest.approx(0.075)
    assert full.groups["Far"].mean == pytest.approx(0.3)
    # groups count the same: (0.675 + 0.3) / 2, not (0.55 + 0.8 + 0.3) / 3
    assert full.mean.mean == pytest.approx(0.4875)
    assert full.mean.standard_error == pytest.approx((0.575 - 0.4) / 2)
    assert ours.mean.mean == pytest.approx(((0.7 + 0.8) / 2 + 0.3) / 2)
    assert (ours.trained_parameters, ours.trained_share) == (5_000, pytest.approx(0.005))
    assert (table.n_missing, table.seconds) == (0, 12 * 2.5)
    assert table.machines == ("2 threads of a CPU, spt_kernels 1, torch 2",)
    value = table.to_json()
    assert json.loads(json.dumps(value)) == value
    assert value["rows"][0]["mean"]["mean"] == pytest.approx(0.4875)


def test_the_table_is_laid_out_as_the_papers(tmp_path: Path) -> None:
    table = read(write(tmp_path / "x", ACCURACIES))
    groups = group_grid(table)
    assert groups.columns == ("method", "trained", "%", "Near", "Far", "mean")
    assert groups.rows == (
        ("full", "1.00M", "100.00", "67.5 ± 7.5", "30.0 ± 10.0", "48.8 ± 8.7"),
        ("spt-lora", "5,000", "0.50", "75.0 ± 5.0", "30.0 ± 5.0", "52.5 ± 0.0"),
    )
    tasks = task_grid(table)
    assert tasks.columns == ("method", "A", "B", "Near mean", "C", "Far mean")
    turned = tasks.turned()
    assert turned.columns == ("method", "full", "spt-lora")
    assert turned.rows[1] == ("B", "80.0 ± 10.0", "80.0 ± 0.0")
    assert [row[0] for row in turned.rows] == ["A", "B", "Near mean", "C", "Far mean"]
    text = markdown([table])
    assert "| method | A | B | Near mean | C | Far mean |" in text
    assert "| --- | ---: | ---: | ---: | ---: | ---: |" in text
    assert "| spt-lora | 70.0 ± 10.0 | 80.0 ± 0.0 | 75.0 ± 5.0 | 30.0 ± 5.0 | 30.0 ± 5.0 |" in text
    assert not any("†" in line or "–" in line for line in notes(table))


def test_two_suites_stand_side_by_side(tmp_path: Path) -> None:
    first = {"full": {"a": (0.5, 0.6)}, "bias": {"a": (0.5, 0.6)}}
    tables = [
        read(write(tmp_path / "x", first, {"a": "FGVC"})),
        read(write(tmp_path / "y", ACCURACIES)),
    ]
    tables[0] = replace(tables[0], suite="FGVC")
    grid = group_grid(*tables)
    assert grid.columns == (
        *("method", "FGVC trained", "FGVC %", "FGVC"),
        *("Suite trained", "Suite %", "Near", "Far", "Suite mean"),
    )
    assert [row[0] for row in grid.rows] == ["full", "bias", "spt-lora"]
    assert grid.rows[0][3:] == (
        *("55.0 ± 5.0", "1.00M", "100.00", "67.5 ± 7.5", "30.0 ± 10.0", "48.8 ± 8.7"),
    )
    assert grid.rows[1][3:] == ("55.0 ± 5.0", "–", "–", "–", "–", "–")
    assert grid.rows[2][1:4] == ("–", "–", "–")
    assert markdown(tables).count("###") == 3


def test_one_group_is_its_own_mean(tmp_path: Path) -> None:
    one = {"full": {"a": (0.5, 0.6), "b": (0.7, 0.9)}}
    table = read(write(tmp_path / "x", one, {"a": "FGVC", "b": "FGVC"}))
    assert group_grid(table).columns == ("method", "trained", "%", "FGVC")
    assert table.rows[0].mean == table.rows[0].groups["FGVC"]
    assert not any("groups' means" in line for line in notes(table))


def test_nothing_is_averaged_over_what_is_there_by_chance(tmp_path: Path) -> None:
    some = {
        "full": {"a": (0.5, 0.6), "b": (None, None), "c": (0.2, 0.4)},
        "spt-lora": {"a": (0.6, 0.8), "b": (0.8, None), "c": (0.35, 0.25)},
        "linear": {},
    }
    output = write(tmp_path / "x", some)
    failed = output / "b" / "full" / "seed1"
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text('{"reason": "out of memory", "trace": ""}')
    table = read(output)
    full, ours, linear = table.rows
    assert (full.groups["Near"].mean, full.mean.mean) == (None, None)
    assert full.groups["Far"].mean == pytest.approx(0.3)
    # of the one seed that both tasks have, and so marked
    assert ours.groups["Near"].by_seed == pytest.approx({0: 0.7})
    assert not ours.groups["Near"].is_complete
    assert ours.mean.mean == pytest.approx((0.7 + 0.35) / 2)
    assert (linear.trained_parameters, linear.mean.mean) == (None, None)
    assert [row[1:] for row in group_grid(table).rows] == [
        ("1.00M", "100.00", "–", "30.0 ± 10.0", "–"),
        ("4,800", "0.48", "70.0†", "30.0 ± 5.0", "52.5†"),
        ("–", "–", "–", "–", "–"),
    ]
    said = "\n".join(notes(table))
    assert "† Not of all seeds" in said
    assert "– Not there; no mean" in said
    assert "9 of 18 runs are missing." in said
    assert "failed: b, full, seed 1: out of memory" in said
    assert table.n_missing == 2 + 1 + 6
    value = table.to_json()
    assert value["rows"][0]["groups"]["Near"] == {
        **{"mean": None, "standard_error": None, "by_seed": {}, "is_complete": False}
    }
    benchmark_figure(table)


def test_the_picture_holds_every_mean(tmp_path: Path) -> None:
    figure = benchmark_figure(read(write(tmp_path / "x", ACCURACIES)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Near", "Far", "mean"]
    labels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert labels == [["67.5", "75.0"], ["30.0", "30.0"], ["48.8", "52.5"]]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["full", "spt-lora"]
    figure.savefig(tmp_path / "x.png")


def test_groups_of_any_number_and_name_have_a_panel_with_its_name_alone(tmp_path: Path) -> None:
    names = ["plants of the alps and of other mountains", "US$ and A$", "mean", "satellite_images"]
    groups = {f"task{place}": name for place, name in enumerate([*names, "T\udce4ler", "digits"])}
    accuracies = {"full": dict.fromkeys(groups, (0.5, 0.6))}
    figure = benchmark_figure(read(write(tmp_path / "x", accuracies, groups)))
    figure.draw_without_rendering()
    shown = [axes for axes in figure.axes if axes.axison]
    assert len({axes.get_position().y0 for axes in shown}) == 2
    titles = [axes.get_title(loc="left") for axes in shown]
    assert titles == [
        *("plants of the\nalps and of…", r"US\$ and A\$", "mean"),
        *("satellite_image\ns", "T?ler", "digits", "mean"),
    ]
    boxes = [axes._left_title.get_window_extent() for axes in shown]
    for box, other in itertools.combinations(boxes, 2):
        assert not box.overlaps(other)
    assert_nothing_is_cut(figure)


def test_a_setting_comes_back_from_its_file(tmp_path: Path) -> None:
    whole = replace(
        setting_of(ACCURACIES), form={"mean": (0.5, 0.5, 0.5)}, choices={"lr": (1e-3, 1e-4)}
    )
    assert BenchmarkSetting.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ()}, "tasks: expected at least one"),
        ({"seeds": (1, 1)}, "seeds: 1 is named twice"),
        ({"methods": (Method("full"), Method("full"))}, "methods: full is named twice"),
        ({"model": ModelSource("vit")}, "weights: method 'spt-lora' needs a pre-trained model"),
    ],
)
def test_a_setting_of_nothing_or_of_one_thing_twice_is_refused(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        replace(setting_of(ACCURACIES), **change)
    odd = replace(setting_of(ACCURACIES).tasks[0], name="../a")
    with pytest.raises(ValueError, match=r"tasks: .*'\.\./a'"):
        replace(setting_of(ACCURACIES), tasks=(odd,))


def test_a_folder_without_a_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no benchmark in"):
        read(tmp_path)
    (tmp_path / "benchmark.json").write_text("{}")
    with pytest.raises(ValueError, match="not of this version"):
        read(tmp_path)
