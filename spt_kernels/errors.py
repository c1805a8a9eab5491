"""The exceptions that callers may want to catch by name."""

from __future__ import annotations


class DeltaFormatError(ValueError):
    """A file is damaged, cut, of a newer format, or holds something that must not be loaded."""


class BaseModelMismatch(ValueError):
    """A task file or a plan was made for another base model than the one at hand."""
