"""Files one after the other, read by as many processes as are to; whether all can be read."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..progress import Progress

MANY = 10_000  # files that one process does not read whole beforehand

F = TypeVar("F")
T = TypeVar("T")


def check_readable(
    files: Sequence[F],
    read: Callable[[F], T],
    glance: Callable[[F], T],
    workers: int,
    progress: Progress,
    stage: str,
) -> list[T]:
    """Read every file once, of very many, without workers, look at each; what was made of them.

    Args:
        files: what there is.
        read: raises ValueError where one cannot be read; what it gives is to be little.
        glance: likewise, by how it begins.
        workers: processes that read; 0 reads in this one.
        progress: told of every file.
        stage: what `progress` is told that this is.
    """
    try_one = glance if len(files) > MANY and workers == 0 else read
    progress.start(stage, len(files))
    found = []
    for made in read_in_order(files, try_one, workers):
        found.append(made)
        progress.advance()
    return found


def read_in_order(files: Sequence[F], read: Callable[[F], T], workers: int = 0) -> Iterator[T]:
    """What is read of each file, in order; errors as `read`'s, whichever process has it.

    Args:
        files: what there is.
        read: of one.
        workers: processes that read; 0 reads in this one.
    """
    loader = DataLoader(
        _Read(files, read),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        # the loader draws a seed for its workers: from its own generator, not from the model's
        generator=torch.Generator().manual_seed(0),
    )
    return loaded(loader)


def _as_it_is(what: T) -> T:
    return what


class _Read(Dataset[T], Generic[F, T]):
    """What is read of each file when it is asked for."""

    def __init__(self, files: Sequence[F], read: Callable[[F], T]) -> None:
        self._files, self._read = files, read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> T:
        return self._read(self._files[number])


def loaded(loader: DataLoader[T]) -> Iterator[Any]:
    """What a loader gives; what one of its workers raises comes as it would without workers.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        yield from loader
    except Exception as error:
        # torch's frames and the error hold each other, and hold the workers: ended by the garbage
        # collector, whenever that may be, each takes five seconds
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, ValueError):
            raise
        # torch hands over the whole traceback as the message
        before, _, own = str(error).rpartition("\nValueError: ")
        if before:
            raise ValueError(own.strip()) from error
        raise
