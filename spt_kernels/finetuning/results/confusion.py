"""Which classes are taken for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...files.picture import FAINT, INK, new_figure, shown_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Right and wrong in two hues that stay apart for colour-blind readers; in grey, right is on the
# diagonal. Both grow darker with the share.
_RIGHT = ("#f3f8fc", "#9ecae1", "#0072B2", "#08305c")
_WRONG = ("#fee3cb", "#fdbe85", "#D55E00", "#6b2e00")
_MOST_WITH_SHARES = 10  # classes; beyond, a cell has room for the count alone
_MOST_WITH_NUMBERS = 24  # classes; beyond, no number would be read in a cell
_MOST_WITH_NAMES = 120
_MOST_WITH_LINES = 300  # lines between cells that are narrower would hide what is in them
_FEWEST_INCHES, _MOST_INCHES = 3.4, 13.0  # side of the matrix
_LEAST_SCALE = 20.0  # % at the end of the scale of what is wrong: few errors do not look like many
_BARS_INCHES = 2.2  # of both scales


def confusion_figure(
    counts: Sequence[Sequence[int]], classes: Sequence[str], *, title: str | None = None
) -> Figure:
    """Of the images of each class (a row), how many were taken for each class (a column).

    Right answers, on the diagonal, are blue, wrong ones orange; the darker, the larger the share of
    the row. Wrong answers have a scale of their own, since they are few. A class without images is
    left blank.

    Args:
        counts: `[true class][predicted class]`, as `Accuracy.confusion` gives them.
        classes: their names.
        title: instead of the one that says how many images are right.
    """
    n = len(classes)
    if n < 1 or len(counts) != n or any(len(row) != n for row in counts):
        raise ValueError(f"counts: expected {n} rows and columns, one for each of classes")
    totals = [sum(row) for row in counts]
    if not any(totals):
        raise ValueError("counts: expected at least one image, got none")
    right = sum(counts[i][i] for i in range(n))
    side = min(max(_FEWEST_INCHES, 0.34 * n if n <= _MOST_WITH_NUMBERS else 0.12 * n), _MOST_INCHES)
    columns = shown_names(classes)
    rows = [f"{name} ({total:,})" for name, total in zip(columns, totals, strict=True)]
    letters = min(9.0, 0.8 * 72 * side / min(n, _MOST_WITH_NAMES))  # points
    # in inches: what names and labels take beside the matrix, and below it
    left, below = (0.5 + max(map(len, names)) * 0.6 * letters / 72 for names in (rows, columns))
    below = below if n > 2 else 0.6
    width, height = left + side + 0.3 + _BARS_INCHES, below + side + 0.4
    figure = new_figure(height)
    figure.set_size_inches(width, height)
    figure.set_layout_engine("none")  # the matrix is to be a square of this side
    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    bars = [
        figure.add_axes((x / width, below / height, 0.16 / width, min(side, 4.0) / height))
        for x in (left + side + 0.3 + place * 0.5 * _BARS_INCHES for place in range(2))
    ]
    shares = [
        [count / total if total else float("nan") for count in row]
        for row, total in zip(counts, totals, strict=True)
    ]
    _draw_cells(axes, bars, shares, n)
    if n <= _MOST_WITH_NUMBERS:
        _write_numbers(axes, counts, shares, n)
    _name_classes(axes, rows, columns, letters)
    whole = sum(totals)
    axes.set_title(
        title or f"{right:,} of {whole:,} images right, {100 * right / whole:.1f} %",
        fontsize=10.5,
        color=INK,
    )
    return figure


def _draw_cells(axes: Axes, bars: list[Axes], shares: list[list[float]], n: int) -> None:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    values = 100 * np.array(shares)
    on_diagonal = np.eye(n, dtype=bool)
    wrong = np.where(on_diagonal | (values == 0), np.nan, values)
    right = np.where(on_diagonal, values, np.nan)
    for place, name, colours, shown, top in (
        (bars[0], "right, % of the class", _RIGHT, right, 100.0),
        (bars[1], "wrong, % of the class", _WRONG, wrong, _scale_of_wrong(shares)),
    ):
        colouring = LinearSegmentedColormap.from_list(name, colours)
        scale = Normalize(0.0, top)
        axes.imshow(shown, cmap=colouring, norm=scale, interpolation="nearest")
        bar = axes.figure.colorbar(ScalarMappable(scale, colouring), cax=place)
        bar.set_label(name, fontsize=8.5, color=INK)
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.outline.set_edgecolor(FAINT)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    if n <= _MOST_WITH_LINES:  # which guide the eye from a name to its row
        edges, width = np.arange(0.5, n - 1), 0.6 if n <= _MOST_WITH_NUMBERS else 0.25
        axes.hlines(edges, -0.5, n - 0.5, colors=FAINT, linewidths=width)
        axes.vlines(edges, -0.5, n - 0.5, colors=FAINT, linewidths=width)
    axes.spines[:].set_color(FAINT)


def _write_numbers(
    axes: Axes, counts: Sequence[Sequence[int]], shares: list[list[float]], n: int
) -> None:
    largest = _scale_of_wrong(shares) / 100
    digits = max(len(str(count)) for row in counts for count in row)
    size = min(9.0 if n <= _MOST_WITH_SHARES else 7.5, 22.0 / digits)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                strength = shares[y][x] if x == y else shares[y][x] / largest
                ink = "white" if strength > 0.5 else INK
                text = f"{count:,}"
                if n <= _MOST_WITH_SHARES:
                    text += f"\n{100 * shares[y][x]:.0f} %"
                axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink)


def _scale_of_wrong(shares: list[list[float]]) -> float:
    """Per cent at the end of the scale; rows without images are NaN and count for nothing."""
    n = len(shares)
    wrong = (100 * shares[y][x] for y in range(n) for x in range(n) if x != y)
    return max((value for value in wrong if value > _LEAST_SCALE), default=_LEAST_SCALE)


def _name_classes(axes: Axes, rows: list[str], columns: list[str], letters: float) -> None:
    places = range(0, len(rows), -(-len(rows) // _MOST_WITH_NAMES))  # of very many, some
    axes.set_yticks(places, [rows[i] for i in places])
    axes.set_xticks(places, [columns[i] for i in places], rotation=90 if len(rows) > 2 else 0)
    axes.tick_params(which="major", labelsize=letters, colors=INK, length=0)
    axes.set_xlabel("taken for", fontsize=9, color=INK)
    axes.set_ylabel("class (images)", fontsize=9, color=INK)
