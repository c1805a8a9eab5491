"""`Running`: whether a forward, before which a module's hook was called, is still running.

What ends a forward but no `Exception`, as Ctrl-C does, passes the hooks behind it by.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType


class Running:
    """A forward that is about to run.

    Args:
        caller: the frame of what has called the hook, and calls the forward next.
    """

    __slots__ = ("_caller", "_thread")

    def __init__(self, caller: FrameType) -> None:
        self._caller, self._thread = caller, threading.get_ident()

    def is_over(self) -> bool:
        """Whether it is not running any more; of another thread's that is not known."""
        if threading.get_ident() != self._thread:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._caller:
            frame = frame.f_back
        return frame is None
