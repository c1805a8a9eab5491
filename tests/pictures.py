"""What tests look for in a picture."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend_of(figure: Figure) -> list[str]:
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def grey(colour: object) -> float:
    """How light a colour is on paper, from 0 to 1."""
    red, green, blue = to_rgb(colour)  # type: ignore[arg-type]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def assert_apart_in_print(colours: list[object]) -> None:
    """Colours that touch differ by a fifth of the scale, any others by a tenth."""
    greys = [grey(colour) for colour in colours]
    assert min(abs(a - b) for a, b in itertools.pairwise(greys)) >= 0.2
    assert min(abs(a - b) for a, b in itertools.combinations(greys, 2)) >= 0.1


def assert_a_picture(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width = int.from_bytes(data[16:20], "big")
    assert 1300 <= width <= 1400
    assert len(data) > 5000


def assert_nothing_is_cut(figure: Figure) -> None:
    """All letters are within the picture."""
    figure.draw_without_rendering()
    unseen = {
        label
        for outer in figure.axes
        for axes in (outer, *outer.child_axes)
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
        if text.get_visible() and text.get_text().strip() and text not in unseen:
            box, whole = text.get_window_extent(), figure.bbox
            across = whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1
            along = whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1
            assert (across, along) == (True, True), text.get_text()
