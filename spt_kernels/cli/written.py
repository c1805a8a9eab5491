"""Whether a command may write where it is told to, found out before its work."""

from __future__ import annotations

from pathlib import Path


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


def check_picture(option: str, path: Path | None, *, force: bool) -> None:
    """As `check_file`, and the name must end as that of a picture."""
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.resolve().parent.is_dir() and (path.is_dir() or path.suffix[1:].lower() not in known):
        raise ValueError(f"{option}: expected a picture as a.png, got {path}")
    check_file(option, path, force=force)


def check_apart(**paths: Path | None) -> None:
    """Refuse options that name the same file, of which one would overwrite the other."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"--{name}: {path} is the {other} as well; name another file")
