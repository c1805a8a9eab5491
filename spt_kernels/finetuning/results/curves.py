"""The training curves of one run or of several, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from ...files.picture import (
    FAINT,
    INK,
    LINE_COLOURS,
    LINES,
    dress,
    new_figure,
    put_heading,
    put_legend,
    put_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Sequence[Mapping[str, Any]]

# what an epoch may tell: its field, what the panel is called, and what it is told in
_PANELS = (
    ("train_loss", "training loss", 1),
    ("val_loss", "validation loss", 1),
    ("val_accuracy", "validation accuracy, %", 100),
)
_FEW = 12  # epochs that are marked one by one


def training_curves_figure(
    records: Mapping[str, Sequence[Any]] | Sequence[Any],
    *,
    title: str | None = None,
    unit: str = "epoch",
) -> Figure:
    """Losses and accuracy over the epochs, one line per run; what no run has gets no panel.

    Training and validation loss of one run share a panel. Of several runs of one name, as with
    other seeds, each is a thin line, and their mean a thick one.

    Args:
        records: the epochs of one run; or by name the epochs of a run, or of several runs. An epoch
            is a mapping or dataclass with `epoch`, `train_loss`, and, where there are such,
            `val_loss` and `val_accuracy` (0 to 1).
        title: above all panels: the model and how it is tuned.
        unit: what the numbers of the epochs count.
    """
    named = records if isinstance(records, Mapping) else {"": records}
    runs = {name: _runs(given) for name, given in named.items()}
    if not any(run for each in runs.values() for run in each):
        raise ValueError("records must hold at least one epoch, got none")
    present = [
        panel
        for panel in _PANELS
        if any(_points(run, panel[0]) for each in runs.values() for run in each)
    ]
    is_one = sum(len(each) for each in runs.values()) == 1
    figure = new_figure(2.9 if is_one else 3.1)
    if is_one:
        handles = _draw_one(figure, present, next(iter(runs.values()))[0])
    else:
        handles = _draw_all(figure, present, runs)
    for axes in figure.axes:
        dress(axes)
        axes.set_xlabel(unit)
        locator: Any = axes.xaxis.get_major_locator()
        locator.set_params(integer=True, min_n_ticks=1)  # no halves of a single epoch
        axes.grid(color=FAINT, linewidth=0.6)
    if title is not None:
        put_heading(figure, title)
    if handles:
        put_legend(figure, handles, min(len(handles), 5))
    return figure


def _draw_one(figure: Figure, present: Sequence[tuple[str, str, int]], run: Run) -> list[Any]:
    """Both losses in one panel, and the accuracy; the lines of the losses come back."""
    fields = {field: (name, factor) for field, name, factor in present}
    losses = [field for field in ("train_loss", "val_loss") if field in fields]
    panels = figure.subplots(1, 1 + ("val_accuracy" in fields), squeeze=False)[0]
    handles = []
    for place, field in enumerate(losses):
        label = fields[field][0].removesuffix(" loss")
        (line,) = _line(panels[0], _points(run, field), 1, place, label=label)
        handles.append(line)
    put_title(panels[0], "loss" if len(losses) > 1 else "training loss")
    if "val_accuracy" in fields:
        name, factor = fields["val_accuracy"]
        _line(panels[1], _points(run, "val_accuracy"), factor, 1)
        put_title(panels[1], name)
    return handles if len(handles) > 1 else []


def _draw_all(
    figure: Figure, present: Sequence[tuple[str, str, int]], runs: Mapping[str, Sequence[Run]]
) -> list[Any]:
    """A panel for each figure of an epoch; one line of each name comes back."""
    panels = figure.subplots(1, len(present), squeeze=False)[0]
    handles = {}
    has_many = any(len(each) > 1 for each in runs.values())
    for axes, (field, title, factor) in zip(panels, present, strict=True):
        for place, (name, each) in enumerate(runs.items()):
            several = [points for run in each if (points := _points(run, field))]
            if len(several) > 1:
                for points in several:
                    _line(axes, points, factor, place, alpha=0.4, linewidth=0.7)
            if several:
                (handles[name],) = _line(axes, _mean(several), factor, place, label=name)
        put_title(axes, title)
    if has_many:
        (note,) = panels[0].plot([], [], color=INK, lw=0.7, label="thin: single runs")
        handles[""] = note
    return list(handles.values()) if len(runs) > 1 or has_many else []


def _line(
    axes: Axes, points: Mapping[int, float], factor: int, place: int, **more: Any
) -> list[Any]:
    look = {
        "color": LINE_COLOURS[place % len(LINE_COLOURS)],
        "linestyle": LINES[place % len(LINES)],
        "linewidth": 1.5,
        "marker": "o" if len(points) < _FEW else None,
        "markersize": 3,
        **more,
    }
    return axes.plot(list(points), [factor * value for value in points.values()], **look)


def _runs(given: Sequence[Any]) -> list[Run]:
    """Several runs, or one, as runs."""
    is_nested = bool(given) and isinstance(given[0], Sequence)
    each = given if is_nested else [given]
    return [[_as_mapping(epoch) for epoch in run] for run in each]


def _points(run: Run, field: str) -> dict[int, float]:
    """Its values by epoch, where it has any."""
    return {e["epoch"]: e[field] for e in run if e.get(field) is not None}


def _mean(several: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Over the epochs that all of them have."""
    shared = [epoch for epoch in several[0] if all(epoch in points for points in several)]
    return {epoch: sum(points[epoch] for points in several) / len(several) for epoch in shared}


def _as_mapping(epoch: Any) -> Mapping[str, Any]:
    if is_dataclass(epoch) and not isinstance(epoch, type):
        return asdict(epoch)
    return epoch
