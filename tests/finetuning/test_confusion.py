"""The confusion picture holds every count, and names that fit, for two classes and for many."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from spt_kernels.files.picture import shown_names
from spt_kernels.finetuning import confusion_figure
from tests.pictures import texts


def test_counts_and_shares_of_two_classes(tmp_path: Path) -> None:
    figure = confusion_figure([[45, 5], [0, 50]], ["cat $1", "d\udcffg"])  # of a folder
    assert {"45\n90 %", "5\n10 %", "50\n100 %"} == texts(figure)
    axes = figure.axes[0]
    assert axes.get_title() == "95 of 100 images right, 95.0 %"
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"cat \$1 (50)", "d?g (50)"]
    figure.savefig(tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n", [1, 24, 100])
def test_every_class_is_named_within_the_picture(n: int) -> None:
    names = [f"a name that is rather long, {i}" if i % 9 == 3 else f"name {i}" for i in range(n)]
    counts = [[4 * (x == y) + (x == y + 1) for x in range(n)] for y in range(n)]
    figure = confusion_figure(counts, names)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    rows, columns = axes.get_yticklabels(), axes.get_xticklabels()
    assert len(rows) == len(columns) == n
    width, _ = figure.get_size_inches() * figure.dpi
    for label in (*rows, axes.yaxis.label, axes.xaxis.label, *columns):
        box = label.get_window_extent()
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= width, label
    boxes = [label.get_window_extent() for label in rows]
    assert all(a.y0 >= b.y1 - 1 for a, b in itertools.pairwise(boxes)), "they overlap"
    assert min(label.get_fontsize() for label in rows) >= 5
    drawn = texts(figure)
    assert bool(drawn) == (n <= 24)


def test_of_very_many_classes_some_are_named() -> None:
    n = 300
    counts = [[2 * (x == y) for x in range(n)] for y in range(n)]
    labels = confusion_figure(counts, [str(i) for i in range(n)]).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels[:3]] == ["0 (2)", "3 (2)", "6 (2)"]


@pytest.mark.parametrize(("n", "kinds"), [(100, 2), (500, 0)])
def test_lines_do_not_hide_cells_that_are_as_narrow(n: int, kinds: int) -> None:
    counts = [[int(x == y) for x in range(n)] for y in range(n)]
    axes = confusion_figure(counts, [str(i) for i in range(n)]).axes[0]
    assert len(axes.collections) == kinds


def test_a_class_without_images_is_blank() -> None:
    figure = confusion_figure([[3, 0], [0, 0]], ["a", "b"])
    assert texts(figure) == {"3\n100 %"}


def test_nonsense_is_refused() -> None:
    for counts, names, words in (
        ([[1, 0]], ["a", "b"], "expected 2 rows"),
        ([[1], [0]], ["a", "b"], "expected 2 rows"),
        ([], [], "expected 0 rows"),
        ([[0, 0], [0, 0]], ["a", "b"], "at least one image"),
    ):
        with pytest.raises(ValueError, match=words):
            confusion_figure(counts, names)


def test_long_names_that_would_look_alike_are_numbered() -> None:
    names = [f"class number {n} with a rather long name" for n in range(10)] + ["pansy"]
    shown = shown_names(names)
    assert len({*shown}) == 11
    assert max(map(len, shown)) <= 24
    assert shown[3].startswith("4 class num")
    assert shown[-1] == "pansy"
