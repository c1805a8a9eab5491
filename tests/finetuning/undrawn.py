"""Runs that draw nothing and account for no memory, both of which take longer than tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_kernels.finetuning import pipeline


class NoPicture:
    def savefig(self, path: Path) -> None:
        path.write_bytes(b"")


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "sensitivity_figure", lambda *_: NoPicture())
    patch.setattr(pipeline, "training_curves_figure", lambda *_, **__: NoPicture())
    patch.setattr(pipeline, "accounted_bytes", lambda *_: 0)
