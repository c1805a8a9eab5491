"""Steps that are undone, the last one first, where a later one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def all_or_nothing(within: ExitStack | None = None) -> Iterator[ExitStack]:
    """Yield what takes the way back of each step, `callback(function, …)`, before it is done.

    On any exception in the `with` block the ways back are gone, and it goes on as it is. What is
    undone where memory has run out should need none.

    Args:
        within: of a larger exchange, which undoes all of this where it fails later.
    """
    with ExitStack() as undo:
        yield undo
        done = undo.pop_all()
        if within is not None:
            within.push(done)
