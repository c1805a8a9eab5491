"""Sparse deltas of parameters that FSDP2 has sharded: each process writes the rows that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...distributed.sharded import is_sharded, local_part, local_rows, whole_vectors


@dataclass(frozen=True, eq=False)
class _LocalEntries:
    """Which entries of a delta lie in the rows of its target that are here.

    Attributes:
        index: of all of them, from which this was found.
        rows: of the target, from and up to.
        first: number of the first entry here.
        stop: number of the first one after those.
        local: int32 `[stop - first]`, their flat positions in the rows here.
    """

    index: Tensor
    rows: tuple[int, int]
    first: int
    stop: int
    local: Tensor

    @classmethod
    def of(cls, index: Tensor, rows: tuple[int, int], row_numel: int) -> _LocalEntries:
        """Look for them: positions are sorted, and so those of some rows are one range."""
        ends = torch.tensor([row * row_numel for row in rows], device=index.device)
        first, stop = torch.searchsorted(index.long(), ends).tolist()
        return cls(index, rows, first, stop, index[first:stop] - rows[0] * row_numel)


def local_deltas(deltas: Sequence[Any], *, with_values: bool) -> list[Any]:
    """The same deltas, as far as this process has what they change.

    A delta is dealt out by entries and its target by rows, so that one exchange brings all entries
    of all deltas to every process: they are few.

    Args:
        deltas: `SparseDelta`s of targets that are sharded or whole; the same in every process.
        with_values: whether to bring the values; without them those of the results mean nothing.
    """
    values: list[Any] = [delta.delta for delta in deltas]
    if with_values:
        apart = [n for n, d in enumerate(deltas) if not d.whole]  # whose values lie elsewhere
        for n, value in zip(apart, whole_vectors([values[n] for n in apart]), strict=True):
            values[n] = value
    return [_local(delta, value) for delta, value in zip(deltas, values, strict=True)]


def _local(delta: Any, values: Any) -> Any:
    if not is_sharded(delta.target):
        return replace(delta, delta=values)
    target = local_part(delta.target)
    if delta.whole:
        some = slice(target.numel())  # all positions, from 0 on
        index, values = delta.index[some], local_part(values)
    else:
        entries = _entries_of(delta)
        some, index = slice(entries.first, entries.stop), entries.local
        values = values if is_sharded(values) else values[some]
    original = delta.original[some]
    return replace(delta, target=target, delta=values, index=index, original=original)


def _entries_of(delta: Any) -> _LocalEntries:
    """What was found before, while it is the same index in the same rows."""
    known, rows = delta.written.local, local_rows(delta.target)
    if isinstance(known, _LocalEntries) and known.index is delta.index and known.rows == rows:
        return known
    found = _LocalEntries.of(delta.index, rows, delta.target.shape[1:].numel())
    delta.written.local = found
    return found
