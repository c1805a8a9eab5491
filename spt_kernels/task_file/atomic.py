"""Atomic writing under the name that a task file once had for it."""

from __future__ import annotations

from ..atomic import write_atomically as write_atomically
