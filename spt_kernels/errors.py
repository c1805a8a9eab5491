"""The exceptions that callers may want to catch by name, and what is known of others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # known by another name to pip


class DeltaFormatError(ValueError):
    """A file is damaged, cut, of a newer format, or holds something that must not be loaded."""


class BaseModelMismatch(ValueError):
    """A task file or a plan was made for another base model than the one at hand."""


class OtherProcessFailed(RuntimeError):
    """Another of the processes that share a computation cannot go on; it raises what went wrong."""


class MissingExtra(ImportError):
    """A package is not installed that one of this package's extras brings."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is PyTorch's `OutOfMemoryError`; told by name, so that torch need not be there."""
    return type(error).__name__ == "OutOfMemoryError"


@contextlib.contextmanager
def needed(purpose: str, extra: str = "cli") -> Iterator[None]:
    """Turn an import that fails in the `with` block into one line that says what to install.

    Args:
        purpose: what the import is for, at the beginning of the line.
        extra: of this package, which brings it.

    Raises:
        MissingExtra: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == __package__:
            raise  # a mistake of ours
        wanted = _DISTRIBUTIONS.get(package, package)
        raise MissingExtra(
            f"{purpose} needs {wanted}: pip install '{__package__}[{extra}]'", name=error.name
        ) from error
