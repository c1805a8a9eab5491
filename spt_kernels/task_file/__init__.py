"""The task file of one tuned model: its layout, its bytes, its place on disk."""

from __future__ import annotations

from .fingerprint import Fingerprint
from .format import (
    FORMAT_VERSION,
    TaskFile,
    decode,
    encode,
    read,
    structured_shapes,
    write,
)

__all__ = [
    "FORMAT_VERSION",
    "Fingerprint",
    "TaskFile",
    "decode",
    "encode",
    "read",
    "structured_shapes",
    "write",
]
