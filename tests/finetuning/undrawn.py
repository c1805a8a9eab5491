"""Runs that draw nothing and account for no memory, both of which take longer than tiny runs."""

from __future__ import annotations

from types import ModuleType

import pytest

from spt_kernels.finetuning import pipeline


def draw_nothing(patch: pytest.MonkeyPatch, pipeline: ModuleType = pipeline) -> None:
    """Of a pipeline on images, or on scenes."""
    leave_pictures_empty(patch, pipeline)
    patch.setattr(pipeline, "accounted_bytes", lambda *_: 0)


def leave_pictures_empty(patch: pytest.MonkeyPatch, pipeline: ModuleType) -> None:
    """Likewise; memory is accounted for."""
    for name in ("sensitivity_figure", "training_curves_figure"):
        patch.setattr(pipeline, name, lambda *_, **__: None)
    patch.setattr(pipeline, "save_picture", lambda _, path: path.write_bytes(b""))
