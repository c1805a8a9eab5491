"""What tests look for in a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def assert_a_picture(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width = int.from_bytes(data[16:20], "big")
    assert 1300 <= width <= 1400
    assert len(data) > 5000
