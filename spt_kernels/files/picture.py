"""How every picture looks: its colours, its size, its axes."""

from __future__ import annotations

import io
import logging
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import needed
from .atomic import write_atomically
from .fonts import fonts_with

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_logger = logging.getLogger("spt_kernels")

# stays apart for colour-blind readers (Okabe and Ito, 2008)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777")
LINE_COLOURS = (*COLOURS[:6], COLOURS[7])  # a line of yellow is none on paper
# apart in print, too
LINES = ("-", (0, (4, 1.3)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 1.5)))
SHADES = ("#f6f9fc", "#9ecae1", "#0072B2", "#08305c")  # from little to much, as greys too
INK = "#24292f"
FAINT = "#d0d7de"
PALE = "#c9d1d9"  # for what only stands beside
# Parts of a stacked bar, apart for colour-blind readers and as greys on paper: each next one is
# lighter or darker than the one before by a fifth of the scale or more
PARTS = ("#061f4a", "#E08214", "#0b7d61", "#8fd0f5", "#fafafa")
WIDTH = 6.0  # inches: letters of 9 points are 5 points high in a column of a paper
LINE = 74  # letters of a heading
DPI = 225  # as wide as a README shows
# Kind of picture -> what makes its bytes hang on the moment unless it is left out
_MOMENT: dict[str, dict[str, Any]] = {
    "png": {},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
# Letters stay letters of an embedded font, and identifiers are the same each time
_WRITING: Any = {"pdf.fonttype": 42, "svg.hashsalt": "spt_kernels"}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, `height` inches high.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    check_can_draw()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture, whole or not at all; the same figure gives the same bytes.

    Letters that its font lacks, such as Chinese ones, are of another that this machine has; those
    that no font has are boxes in it, which is said once.

    Args:
        figure: what to write.
        path: ends in `.png`, `.pdf` or `.svg`. The last two are drawn in lines, with their fonts.

    Raises:
        ValueError: it ends in something else.
        OSError: it cannot be written.
    """
    kind = kind_of_picture(path)
    from matplotlib.text import Text

    data, boxes = _drawn(figure, kind)
    fonts = fonts_with(boxes)
    if fonts:
        for text in figure.findobj(Text):
            text.set_fontfamily([*text.get_fontfamily(), *fonts])  # type: ignore[attr-defined]
        data, boxes = _drawn(figure, kind)
    if boxes:
        _logger.warning("%s: boxes stand for letters that no font has: %s", path, boxes)
    write_atomically(path, data)


def _drawn(figure: Figure, kind: str) -> tuple[bytes, str]:
    """The bytes of a picture, and the letters in whose places it has boxes."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context(_WRITING), warnings.catch_warnings(record=True) as seen:
        figure.savefig(data, format=kind, dpi=figure.dpi, metadata=_MOMENT[kind])
    boxes = ""
    for warning in seen:
        glyph = re.match(r"Glyph (\d+) .*missing from font", str(warning.message))
        if glyph:
            boxes += chr(int(glyph[1]))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return data.getvalue(), boxes


def kind_of_picture(path: str | os.PathLike[str]) -> str:
    """`png`, `pdf` or `svg`, as the name of a file has it; `ValueError` for any other."""
    kind = Path(path).suffix[1:].lower()
    if kind not in _MOMENT:
        *most, last = (f"a.{name}" for name in _MOMENT)
        raise ValueError(f"expected a picture as {', '.join(most)} or {last}, got {path}")
    return kind


def check_can_draw() -> None:
    """Before the work whose picture would be drawn after it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with needed("drawing"):
        import matplotlib.figure as _  # noqa: F401


def dress(*every: Axes, letters: float = 8.5) -> None:
    """Give axes the lines and letters, of so many points, that all pictures have."""
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(INK)
        axes.tick_params(labelsize=letters, colors=INK)
        axes.xaxis.label.set(size=letters + 0.5, color=INK)
        axes.yaxis.label.set(size=letters + 0.5, color=INK)
        axes.set_axisbelow(True)


def shown_name(name: str, most: int = 24) -> str:
    """A name that somebody gave, as pictures show it: a long one without its middle.

    Args:
        name: of a class, a task, a folder; a dollar in it begins no formula, and bytes that are no
            letters are question marks.
        most: letters.
    """
    name = name.encode(errors="replace").decode()
    if len(name) > most:
        after = most // 2
        name = f"{name[: most - 1 - after]}…{name[-after:]}"
    return name.replace("$", r"\$")


def shown_names(names: Sequence[str], most: int = 24) -> list[str]:
    """Each as `shown_name`; those that would look alike begin with their number among all."""
    shown = [shown_name(name, most) for name in names]
    alike = {one for one, count in Counter(shown).items() if count > 1}
    return [
        f"{n} {shown_name(name, most - len(f'{n} '))}" if one in alike else one
        for n, (name, one) in enumerate(zip(names, shown, strict=True), 1)
    ]


def put_title(axes: Axes, text: str, letters: float = 9) -> None:
    """Name what axes show, above them on the left, in letters of so many points."""
    axes.set_title(text, loc="left", fontsize=letters, color=INK)


def put_heading(figure: Figure, *lines: str) -> None:
    """Say above everything what the picture is of."""
    text = "\n".join(line for given in lines for line in _wrapped(given))
    figure.suptitle(text, fontsize=9.5, color=INK, x=0.01, ha="left")


def put_legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """Say below everything what colours and marks mean."""
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, LINE, break_on_hyphens=False) or [""]
