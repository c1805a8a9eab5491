"""The output folder of a run that several processes share, of which the first alone writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...distributed import Processes
from .run_folder import RunFolder

# what decides how a run goes on
_TOLD = ("config", "result", "seconds", "plan", "checkpoint", "state", "metrics")


@contextlib.contextmanager
def opened(
    processes: Processes, path: str | os.PathLike[str], *, resume: bool, force: bool
) -> Iterator[RunFolder]:
    """`RunFolder.open`, in the first process; for the others a folder that goes when they are done.

    Theirs holds what the first one's holds of the run, so that all decide alike, and machines need
    not see each other's disks.

    Raises:
        ValueError: as `RunFolder.open`, in the first process.
        OtherProcessFailed: likewise, in the others.
    """
    own = processes.from_first(lambda: RunFolder.open(path, resume=resume, force=force))
    told = processes.from_first(lambda: _told_by(own) if resume else {})
    if processes.is_first:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="spt-kernels-") as place:
        copy = RunFolder(Path(place), replaces=own.replaces)
        for name, content in told.items():
            copy[name].write_bytes(content)
        yield copy


def _told_by(folder: RunFolder) -> dict[str, bytes]:
    return {name: folder[name].read_bytes() for name in _TOLD if folder[name].is_file()}
