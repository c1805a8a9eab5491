"""Each picture shows its numbers, of one input and of six, whole and readable."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from spt_kernels.methods import METHODS
from spt_kernels.plan import allocate
from spt_kernels.plots import (
    AccuracyTable,
    accuracy_by_budget,
    allocation,
    allocation_figure,
    budget_figure,
    overlap_figure,
    pretraining_figure,
    read_runs,
    samples_ablation,
    samples_figure,
    selection_overlap,
    shares_figure,
    structure_ablation,
    structure_figure,
    task_shares,
    variance_over_tasks,
)
from spt_kernels.plots.figures.paper import series
from tests.pictures import assert_nothing_is_cut, texts, titles

from .made_up import A, B, plan, run, scores

NAMES = ("cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn")


def six() -> dict:
    return {name: plan(own) for name, own in zip(NAMES, itertools.cycle((A, B)), strict=False)}


def key_of(figure: Figure) -> list[str]:
    """All that the keys below axes and pictures name."""
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def names_along(axes, which: str = "x") -> list[str]:
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def test_shares_of_one_task_need_no_key() -> None:
    figure = shares_figure(task_shares({"cifar": plan(A)}, "block"))
    [axes] = figure.axes
    inside, outside = axes.lines
    assert list(inside.get_ydata()) == [50, 50]
    assert len(outside.get_ydata()) == 0  # nothing is selected outside the blocks
    assert names_along(axes) == ["0", "1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "block",
        "% of the 10 most\nsensitive parameters",
    )
    assert key_of(figure) == []
    assert_nothing_is_cut(figure)


def test_shares_of_six_tasks_are_apart_in_colour_mark_and_stroke() -> None:
    figure = shares_figure(task_shares(six(), "operation"))
    [axes] = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    assert key_of(figure) == list(NAMES)
    assert [line.get_label() for line in lines] == list(NAMES)
    for read in ("get_color", "get_marker"):
        assert len({str(getattr(line, read)()) for line in lines}) == 6
    assert names_along(axes) == ["q", "k", "v", "fc1", "bias", "norm"]
    assert list(lines[1].get_ydata()) == [0, 20, 0, 80, 0, 0]
    assert_nothing_is_cut(figure)


def test_more_than_six_tasks_are_panels_and_so_are_pretrainings() -> None:
    many = {f"task {i}": plan(A) for i in range(19)}
    figure = shares_figure(task_shares(many, "block"))
    drawn = [axes for axes in figure.axes if axes.lines]
    assert [len(axes.lines) // 2 for axes in drawn] == [5, 5, 5, 4]
    assert sorted(key_of(figure)) == sorted(many)
    assert_nothing_is_cut(figure)
    both = shares_figure({n: task_shares(six(), "block") for n in ("supervised", "MAE")})
    assert titles(both) == ["supervised", "MAE"]
    assert key_of(both) == list(NAMES)  # once for both
    assert_nothing_is_cut(both)
    with pytest.raises(ValueError, match="all by block or all by operation"):
        shares_figure({"a": task_shares(six(), "block"), "b": task_shares(six(), "operation")})


def test_stages_are_named_and_parted() -> None:
    shapes = {f"stages.{s}.blocks.{b}.mlp.fc1.weight": (4, 4) for s, n in ((0, 2), (1, 3))
              for b in range(n)} | {"norm.weight": (4,)}  # fmt: skip
    high = {"stages.1.blocks.2.mlp.fc1.weight": [1, 2, 3], "norm.weight": [0]}
    made = allocate(scores(high, shapes), 4, structured=None)
    for figure in (
        shares_figure(task_shares({"a": made}, "block")),
        allocation_figure(allocation(made)),
    ):
        axes = figure.axes[0]
        assert names_along(axes) == ["0", "1", "rest"]
        assert axes.get_xticks() == pytest.approx([0.5, 3, 5.6])
        assert axes.get_xlabel() == "stage (its blocks in order)"
        assert_nothing_is_cut(figure)


def test_allocation_marks_modules_and_entries() -> None:
    measured = scores({"blocks.1.mlp.fc1.weight": list(range(20)), "norm.weight": [0, 1]})
    made = allocation(allocate(measured, 15, "lora", rank=1))
    figure = allocation_figure(made)
    axes, bar = figure.axes
    marks = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert marks["LoRA"] == [(1, made.operations.index("fc1"))]
    trained = [key for key, cell in made.cells.items() if cell.unstructured]
    assert len(marks["single entries"]) == len(trained) > 0
    assert len(axes.patches) == len(made.cells)
    assert key_of(figure) == ["LoRA", "single entries"]
    assert bar.get_ylabel() == "selected, %"
    assert_nothing_is_cut(figure)
    measured = scores({"blocks.1.mlp.fc1.weight": list(range(32))})
    adapters = allocation_figure(allocation(allocate(measured, 30, "adapter", rank=1)))
    assert key_of(adapters)[0] == "Adapter"


@pytest.mark.parametrize("columns", [1, 2])
def test_variance_has_a_line_and_bars_for_each_pretraining(columns: int) -> None:
    made = variance_over_tasks(
        {"supervised": {"x": plan(A), "y": plan(A)}, "MAE": {"x": plan(A), "y": plan(B)}}
    )
    figure = pretraining_figure(made, columns=columns)
    blocks, operations = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in blocks.lines}
    assert lines["MAE"] == pytest.approx([450, 450])
    assert [bar.get_height() for bar in operations.patches[6:]] == pytest.approx(
        made.by_operation["MAE"]
    )
    assert blocks.get_ylabel() == "variance over 2 tasks,\n(% points)²"
    assert key_of(figure) == ["supervised", "MAE"]
    assert_nothing_is_cut(figure)


def test_overlap_shows_both_numbers_of_each_pair() -> None:
    made = selection_overlap({"a": plan(A), "b": plan(B)})
    figure = overlap_figure(made)
    assert texts(figure) == {"33", "×3.5"}  # 5 of 15, over 1.75 of 18.25
    assert_nothing_is_cut(figure)
    figure = overlap_figure(selection_overlap(six()))
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert len(cells) == 6 * 5
    assert cells.count("100") == 6  # three pairs of A's, three of B's
    assert_nothing_is_cut(figure)
    long = {f"a task of a long name {i}": plan(A) for i in range(9)}
    assert_nothing_is_cut(overlap_figure(selection_overlap(long)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for task, seed in itertools.product(("x", "y"), range(2)):
        for samples, name in itertools.product((240, 800), ("spt-lora", "spt-unstructured")):
            accuracy = 0.5 + 0.1 * seed + samples / 8000 + 0.1 * (task == "y")
            at = folder / task / f"{name}-{samples}" / f"seed{seed}"
            run(at, accuracy, name, seed=seed, samples=samples)
        for size in (4, 16):
            at = folder / task / f"lora-{size}" / f"seed{seed}"
            run(at, 0.5, f"lora-{size}", seed=seed, trained=40 * size)
        run(folder / task / "linear" / f"seed{seed}", 0.3, "linear", seed=seed, trained=0)
        run(folder / task / "full" / f"seed{seed}", 0.4, "full", seed=seed, trained=10_000)
    return folder


def table_of(runs: Path, *methods: str) -> AccuracyTable:
    return accuracy_by_budget(read_runs([runs], methods).runs)


def test_accuracy_against_budget(runs: Path) -> None:
    made = table_of(runs)
    figure = budget_figure(made)
    [axes] = figure.axes
    drawn = {c.get_label(): c.lines[0].get_data() for c in axes.containers}
    assert list(drawn["lora-K"][0]) == [160, 640]
    assert list(drawn["lora-K"][1]) == [50, 50]
    assert set(key_of(figure)) == {
        *("full (10k)", "linear", "lora-K", "± standard error, 2 seeds"),
        *("spt-lora, samples 240", "spt-lora, samples 800"),
        *("spt-unstructured, samples 240", "spt-unstructured, samples 800"),
    }
    caps = [cap for container in axes.containers for cap in container.lines[1]]
    assert min(cap.get_markeredgewidth() for cap in caps) > 0
    assert axes.get_xlabel() == "trained parameters, without the head"
    assert axes.get_ylabel() == "mean test accuracy, %\nover 2 tasks"
    assert_nothing_is_cut(figure)
    for columns in (1, 2):
        assert_nothing_is_cut(budget_figure(table_of(runs, "lora-4"), columns=columns))
    assert key_of(budget_figure(table_of(runs, "linear")))[0] == "linear"


def test_what_was_chosen_for_each_task_is_a_line_of_its_own(runs: Path) -> None:
    made = table_of(runs, "spt-lora")
    [fixed] = [row for row in made.each if row.settings["samples"] == 800]
    chosen = replace(fixed, trained=90.0, settings={**fixed.settings, "budget": "chosen"})
    figure = budget_figure(replace(made, each=(fixed, chosen)))
    assert key_of(figure)[:2] == ["spt-lora", "spt-lora, budget chosen"]
    assert_nothing_is_cut(figure)


def test_a_line_is_over_sizes_alone_and_every_level_is_drawn(tmp_path: Path) -> None:
    for place, (trained, settings) in enumerate(
        [
            (50, {}),
            (100, {"budget": 100}),
            (49, {"rule": "published-code"}),
            (99, {"rule": "published-code", "budget": 100}),
            (50, {"rank": 4}),
        ]
    ):
        run(tmp_path / f"spt{place}", 0.5 + place / 100, trained=trained, **settings)
    for rank in (8, 16):
        run(tmp_path / f"lora{rank}", 0.6, "lora", trained=10 * rank, rank=rank)
    for blocks in (1, 6, 8):
        run(tmp_path / f"last{blocks}", blocks / 10, f"partial-{blocks}", trained=900 * blocks)
    figure = budget_figure(table_of(tmp_path))
    [axes] = figure.axes
    drawn = {c.get_label(): list(c.lines[0].get_xdata()) for c in axes.containers}
    assert {label.replace("\n", " "): at for label, at in drawn.items()} == {
        "partial-1": [900],
        "lora": [80, 160],
        "spt-lora, rank by default, rule paper": [50, 100],
        "spt-lora, rank by default, rule published-code": [49, 99],
        "spt-lora, rank 4, rule paper": [50],
    }
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0]}
    assert (levels["partial-6 (5,400)"], levels["partial-8 (7,200)"]) == (60, 80)
    assert_nothing_is_cut(figure)


def test_settings_that_are_long_to_tell_are_told_whole(tmp_path: Path) -> None:
    every = ((240, 4, "paper", 0.01), (800, None, "published-code", None), (800, 4, "paper", 0.01))
    for place, (samples, rank, rule, budget) in enumerate(every):
        settings = {"samples": samples, "rank": rank, "rule": rule, "budget": budget}
        for name in ("spt-lora", "spt-unstructured"):
            run(tmp_path / f"{name}{place}", 0.5 + place / 100, name, **settings)
    found = read_runs([tmp_path]).runs
    figure = samples_figure(samples_ablation(found))
    told = [label.replace("\n", " ") for label in key_of(figure)]
    assert "spt-lora, budget by default, rank by default, rule published-code" in told
    assert_nothing_is_cut(figure)
    for columns in (1, 2):
        figure = structure_figure(structure_ablation(found), columns=columns)
        assert_nothing_is_cut(figure)
        table, _ = figure.axes
        named = [label.get_window_extent().x1 for label in table.get_yticklabels()]
        cells = [text.get_window_extent() for text in table.texts]
        assert max(named) < min(cell.x0 for cell in cells)
        for one, other in itertools.combinations(cells, 2):
            assert not one.overlaps(other)


def test_as_many_methods_as_there_are_look_apart() -> None:
    looks = [series(place) for place in range(len(METHODS))]
    marked = {(own["color"], own["marker"]) for own in looks}
    levels = {(own["color"], str(own["linestyle"])) for own in looks}
    assert len(marked) == len(levels) == len(METHODS)
    for own, other in itertools.combinations(looks, 2):
        if own["color"] == other["color"]:  # as marks have in print
            assert own["marker"] != other["marker"]


def test_accuracy_against_samples(runs: Path) -> None:
    made = samples_ablation(read_runs([runs], ["spt-lora"]).runs)
    figure = samples_figure(made)
    [axes] = figure.axes
    [line] = axes.containers
    assert list(line.lines[0].get_xdata()) == [240, 800]
    # over x and y, seeds 0 and 1: 0.6 + samples / 8000
    assert list(line.lines[0].get_ydata()) == pytest.approx([63, 70])
    assert names_along(axes) == ["240", "800"]
    assert key_of(figure) == ["spt-lora", "± standard error, 2 seeds"]
    assert_nothing_is_cut(figure)


def test_structure_is_a_table_and_dots(runs: Path) -> None:
    found = [r for r in read_runs([runs]).runs if r.settings["samples"] == 800]
    figure = structure_figure(structure_ablation(found))
    table, axes = figure.axes
    assert names_along(table, "y") == ["spt-lora", "spt-unstructured"]
    assert [t.get_text() for t in table.texts] == [
        *("LoRA", "yes", "50"),
        *("–", "yes", "50"),
        *("module", "entries", "trained"),
    ]
    assert [t.get_text() for t in axes.texts] == ["70.0", "70.0"]
    assert figure.get_supxlabel() == "test images, mean over 2 tasks\n± standard error, 2 seeds"
    assert_nothing_is_cut(figure)


@pytest.mark.parametrize("name", ["of a long name that somebody gave it", "$\\sum$ of US$ and A$"])
@pytest.mark.parametrize("columns", [None, 1])
def test_any_name_is_shown_whole_or_without_its_middle(
    name: str, columns: int | None, runs: Path
) -> None:
    tasks = {f"a task {name}, {place}": own for place, own in enumerate(six().values())}
    one, *_ = read_runs([runs], ["spt-lora"]).runs
    alone = accuracy_by_budget([replace(one, task=f"a task {name}")])
    shares = task_shares(tasks, "block")
    figures = (
        shares_figure(shares, columns=columns),
        shares_figure({f"a panel {name}, {place}": shares for place in range(3)}, columns=columns),
        overlap_figure(selection_overlap(tasks), columns=columns),
        pretraining_figure(variance_over_tasks(dict.fromkeys(tasks, tasks)), columns=columns),
        budget_figure(alone, columns=columns),
    )
    for figure in figures:
        assert_nothing_is_cut(figure)
    for figure in figures[:2]:
        assert [label[-3:] for label in key_of(figure)] == [f", {place}" for place in range(6)]


def test_a_title_and_a_width_that_a_paper_has() -> None:
    figure = shares_figure(task_shares(six(), "block"), columns=2, title="CIFAR")
    assert figure.get_suptitle() == "CIFAR"
    assert figure.get_size_inches()[0] == 6.9
    text = "Of $5 and $6, \udce4 title that goes on and on, and is longer than a column is wide"
    for columns in (1, 2):
        figure = overlap_figure(selection_overlap(six()), columns=columns, title=text)
        whole = figure.get_suptitle().replace("\n", " ").replace("\\$", "$")
        assert whole == text.replace("\udce4", "?")
        assert_nothing_is_cut(figure)
    for draw in (
        lambda: shares_figure(task_shares(six(), "block"), columns=3),
        lambda: overlap_figure(selection_overlap(six()), columns=3),
    ):
        with pytest.raises(ValueError, match="columns: expected 1 or 2, got 3"):
            draw()
