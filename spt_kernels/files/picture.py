"""How every picture looks: its colours, its size, its axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# stays apart for colour-blind readers (Okabe and Ito, 2008)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777")
INK = "#24292f"
FAINT = "#d0d7de"
WIDTH = 9.0  # inches; at 150 dpi as wide as a README shows


def new_figure(height: float) -> Figure:
    """An empty figure, `height` inches high.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'spt_kernels[cli]' brings it"
        ) from error
    return Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")


def dress(*every: Axes) -> None:
    """Give axes the lines and letters that all pictures have."""
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(INK)
        axes.tick_params(labelsize=8.5, colors=INK)
        axes.xaxis.label.set(size=9, color=INK)
        axes.set_axisbelow(True)


def put_title(axes: Axes, text: str) -> None:
    """Name what axes show, above them on the left."""
    axes.set_title(text, loc="left", fontsize=10, color=INK)
