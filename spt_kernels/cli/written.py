"""Whether a command may write where it is told to, found out before its work."""

from __future__ import annotations

from pathlib import Path

from ..files.atomic import try_folder
from ..files.picture import check_can_draw, kind_of_picture


def check_file(option: str, path: Path | None, *, force: bool) -> None:
    """Refuse a file that could not be written, or that is there and not to be overwritten.

    Args:
        option: as on the command line.
        path: the file; `None` is fine.
        force: whether one that is there is overwritten.

    Raises:
        ValueError: it names the option.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{option}: no such folder: {folder}")
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {path}")
    if path.exists() and not force:
        raise ValueError(f"{option}: {path} is there already; --force overwrites it")
    _try(option, folder)


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that could not be made, or not be written into.

    Raises:
        ValueError: it names the option.
    """
    whole = folder.resolve()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{option}: expected a folder, got the file {there}")
    _try(option, there)


def _try(option: str, folder: Path) -> None:
    try:
        try_folder(folder)
    except OSError as error:
        raise ValueError(
            f"{option}: cannot write to {folder} ({error.strerror or error})"
        ) from error


def check_picture(option: str, path: Path | None, *, force: bool) -> None:
    """As `check_file`, and the name must end as that of a picture.

    Raises:
        ValueError: it names the option.
        MissingExtra: matplotlib is not installed.
    """
    if path is None:
        return
    check_can_draw()
    try:
        kind_of_picture(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    check_file(option, path, force=force)


def check_spared(option: str, path: Path, **read: str | Path | None) -> None:
    """Refuse a file that is read, and would be lost, `--force` or not.

    Args:
        option: as on the command line.
        path: what it names.
        read: files by what they are.
    """
    for name, other in read.items():
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            what = name.replace("_", " ")
            raise ValueError(f"{option}: {path} is the {what}, which is read; name another file")


def check_apart(**paths: Path | None) -> None:
    """Refuse options that name the same file, of which one would overwrite the other."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"--{name}: {path} is the {other} as well; name another file")
