"""The seconds that a run takes, over all its resumes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .run_folder import RunFolder


@dataclass
class RunClock:
    """The seconds that a run takes, over all its resumes.

    Attributes:
        spent: before this process began on it.
    """

    spent: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> float:
        """The seconds until now."""
        return self.spent + time.monotonic() - self.began


def spent_in(folder: RunFolder) -> float:
    """The seconds that the run in `folder` has taken, to its last epoch or its end."""
    records = (folder.read_json(name) or {} for name in ("seconds", "result"))
    return max(float(record.get("seconds", 0.0)) for record in records)
