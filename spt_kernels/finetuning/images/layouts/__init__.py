"""Data sets as their authors share them: which images are of which split and class."""

from __future__ import annotations

from .layout import LAYOUTS, Layout, layout_of, read_layout

__all__ = ["LAYOUTS", "Layout", "layout_of", "read_layout"]
