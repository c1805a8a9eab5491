"""Writing a file so that its path always holds a whole one: the old, or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path`, on disk and whole when this returns.

    It is written to a temporary file in the same folder, synced and renamed. On any error the
    temporary file is removed and what was at `path` stays; a killed process can leave a hidden
    `.….tmp` behind.
    A symbolic link stays a link: the file it points to is replaced. A file that was there keeps its
    permissions.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; its `filename` is
            `path`, whatever was being written at that moment.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not target.parent.is_dir():  # told in terms of what was asked for, not of a temporary file
        raise FileNotFoundError(errno.ENOENT, "no such folder to write to", str(path))
    # a name has 255 bytes, a letter up to four of them
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:  # also an interrupt must not leave the temporary file behind
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    _sync_folder(target.parent)


def try_folder(folder: Path) -> None:
    """See whether `write_atomically` could write into a folder, and leave nothing there.

    Raises:
        OSError: it could not, or the folder is missing.
    """
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    with open(probe, "xb"):
        pass
    probe.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder; the file itself is synced and in place
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
