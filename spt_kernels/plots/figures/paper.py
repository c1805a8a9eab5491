"""How pictures for a paper look: as wide as one or both of its columns, in letters it can show."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...files.picture import FAINT, INK, LINE_COLOURS, LINES, dress, new_figure, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {1: 3.3, 2: 6.9}  # inches of so many columns
LETTERS, SMALL = 7.5, 7.0  # points
_DPI = 300
_WIDE = 0.64  # of its height, a letter of a line that is to fit
_TITLE_LINE = 0.2  # inches
LONGEST = 28  # letters of a name in a key, of which panels beside one another may have one each
_KEY = {"handlelength": 2.2, "columnspacing": 1.2, "handletextpad": 0.5}  # in letters
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def width_of(columns: int) -> float:
    """Inches of so many columns of a paper; `ValueError` for other than 1 or 2."""
    if columns not in WIDTHS:
        raise ValueError(f"columns: expected 1 or 2, got {columns}")
    return WIDTHS[columns]


def paper_figure(columns: int, height: float, title: str | None = None) -> Figure:
    """An empty figure as wide as so many columns of a paper, `height` inches high below its title.

    Raises:
        ValueError: columns other than 1 or 2.
        MissingExtra: matplotlib is not installed.
    """
    letters = LETTERS + 1
    lines = textwrap.wrap(title or "", int(72 * width_of(columns) / (_WIDE * letters)))
    figure = new_figure(height + len(lines) * _TITLE_LINE, width_of(columns))
    figure.set_dpi(_DPI)
    if lines:
        text = "\n".join(shown_name(line, len(line)) for line in lines)
        figure.suptitle(text, fontsize=letters, color=INK)
    return figure


def series(place: int) -> dict[str, Any]:
    """How the line of a series looks: apart by colour, by its marks and by its strokes.

    Where colours begin again, their marks are others, and open ones.
    """
    lap, shade = divmod(place, len(LINE_COLOURS))
    return {
        "color": LINE_COLOURS[shade],
        "linestyle": LINES[place % len(LINES)],
        "marker": _MARKERS[(place + lap) % len(_MARKERS)],
        "markerfacecolor": "white" if lap % 2 else LINE_COLOURS[shade],
        "linewidth": 1.0,
        "markersize": 3.2,
        "markeredgewidth": 0.8 if lap % 2 else 0.0,
    }


def finish(*every: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Give axes their lines and letters."""
    dress(*every, letters=SMALL)
    for axes in every:
        axes.tick_params(width=0.6, length=2.5)
        axes.spines[:].set_linewidth(0.6)
        axes.grid(axis=grid, color=FAINT, linewidth=0.5)


def in_key(name: str, columns: int) -> str:
    """A name of settings as keys have it: in lines that go into so many columns of a paper."""
    room = 72 * width_of(columns) - SMALL * (_KEY["handlelength"] + _KEY["handletextpad"])
    return textwrap.fill(name, int(room / (_WIDE * SMALL)), break_on_hyphens=False)


def key_inches(names: Sequence[str], columns: int) -> float:
    """How high a key of such names is, in so many columns of its own."""
    rows = -(-len(names) // columns)
    in_column = [names[at : at + rows] for at in range(0, len(names), rows)]
    return 0.15 * max(sum(1 + name.count("\n") for name in own) for own in in_column)


def key_columns(names: Sequence[str], width: float, most: int) -> int:
    """In how many columns, `most` at most, a key of such names goes into so many inches."""
    import numpy as np
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    letters = FontProperties(size=SMALL)
    name_widths = [
        max(
            text_to_path.get_text_width_height_descent(line, letters, ismath=False)[0]
            for line in name.split("\n")
        )
        for name in names
    ]
    mark = SMALL * (_KEY["handlelength"] + _KEY["handletextpad"])
    between = SMALL * _KEY["columnspacing"]
    for columns in range(min(most, len(names)), 1, -1):
        # as a key is filled: column by column
        widest = [max(part) for part in np.array_split(name_widths, columns)]
        if sum(widest) + columns * (mark + between) <= 72 * width:
            return columns
    return 1


def put_key(target: Axes | Figure, handles: Sequence[Any], columns: int) -> None:
    """Say below axes, or below all of them, what colours and marks mean."""
    from matplotlib.figure import Figure

    look: dict[str, Any] = {
        "handles": list(handles),
        "ncols": columns,
        "frameon": False,
        "fontsize": SMALL,
        "labelcolor": INK,
        "borderaxespad": 0.3,
        **_KEY,
    }
    if isinstance(target, Figure):
        target.legend(loc="outside lower center", **look)
    else:
        target.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), **look)


def short_count(count: float) -> str:
    """`400000` as `0.4M`, `12600` as `12.6k`, what is below as it is."""
    for limit, size, unit in ((1e5, 1e6, "M"), (1e4, 1e3, "k")):
        if count >= 0.999 * limit:  # where a scale computes its ticks, they are near
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"
