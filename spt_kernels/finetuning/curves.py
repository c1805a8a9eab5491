"""The training curves of one run or of several, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from ..files.picture import COLOURS, FAINT, INK, dress, new_figure, put_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_curves_figure(
    records: Mapping[str, Sequence[Any]] | Sequence[Any], *, title: str | None = None
) -> Figure:
    """Training loss and accuracy over the epochs, one line per run.

    Args:
        records: the epochs of one run, or of several by name. An epoch is a mapping or dataclass
            with `epoch`, `train_loss`, and `val_accuracy` (0 to 1) where there is one.
        title: above both panels.
    """
    runs = records if isinstance(records, Mapping) else {"": records}
    runs = {name: [_as_mapping(epoch) for epoch in epochs] for name, epochs in runs.items()}
    if not any(runs.values()):
        raise ValueError("records must hold at least one epoch, got none")
    figure = new_figure(3.3)
    left, right = figure.subplots(1, 2)
    styles = ("-", "--", "-.", ":")
    for place, (name, epochs) in enumerate(runs.items()):
        look = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": styles[place // len(COLOURS) % len(styles)],
            "label": name,
            "marker": "o" if len(epochs) < 12 else None,
            "markersize": 3.5,
        }
        left.plot([e["epoch"] for e in epochs], [e["train_loss"] for e in epochs], **look)
        seen = [e for e in epochs if e.get("val_accuracy") is not None]
        if seen:
            right.plot([e["epoch"] for e in seen], [100 * e["val_accuracy"] for e in seen], **look)
    dress(left, right)
    put_title(left, "training loss (cross entropy)")
    put_title(right, "validation accuracy, %")
    if not right.lines:
        right.text(0.5, 0.5, "no validation", ha="center", color=INK, transform=right.transAxes)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=FAINT, linewidth=0.6)
    if len(runs) > 1:
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    if title:
        figure.suptitle(title, fontsize=10.5, color=INK)
    return figure


def _as_mapping(epoch: Any) -> Mapping[str, Any]:
    if is_dataclass(epoch) and not isinstance(epoch, type):
        return asdict(epoch)
    return epoch
