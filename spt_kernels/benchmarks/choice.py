"""Which tasks of a benchmark are asked for, and all that keeps them from being read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..methods.method import did_you_mean
from .task import BenchmarkTask


def chosen(names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Those of `known` that are asked for, in their own order; all where no name is given.

    Raises:
        ValueError: a name is not among them.
    """
    known = tuple(known)
    if unknown := [name for name in names if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"tasks: expected of {', '.join(known)}, got {unknown[0]!r}{hint}")
    return tuple(name for name in known if not names or name in names)


def every(
    names: Iterable[str], make: Callable[[str], BenchmarkTask], what: str
) -> tuple[BenchmarkTask, ...]:
    """The task that `make` makes of each name.

    Args:
        names: of tasks.
        make: raises `ValueError` where a task is incomplete.
        what: the benchmark, with how its folder must look, for that error.

    Raises:
        ValueError: tasks are incomplete: what is wrong with each, all at once.
    """
    made, wrong = [], []
    for name in names:
        try:
            made.append(make(name))
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        those = "`tasks` takes those that are whole"
        raise ValueError("\n  ".join([f"{what}; {those}; incomplete:", *wrong]))
    return tuple(made)
