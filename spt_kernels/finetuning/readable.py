"""That every file which is to be read can be, found out before the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .progress import Progress

MANY = 10_000  # files that one process does not read whole beforehand

F = TypeVar("F")
T = TypeVar("T")


def check_readable(
    files: Sequence[F],
    read: Callable[[F], object],
    glance: Callable[[F], object],
    workers: int,
    progress: Progress,
    stage: str,
) -> None:
    """Read every file once and keep nothing; of very many, without workers, look at each.

    Args:
        files: what there is.
        read: raises ValueError where one cannot be read.
        glance: likewise, by how it begins.
        workers: processes that read; 0 reads in this one.
        progress: told of every file.
        stage: what `progress` is told that this is.
    """
    try_one = glance if len(files) > MANY and workers == 0 else read
    progress.start(stage, len(files))
    loader = DataLoader(
        _Tried(files, try_one),
        batch_size=16,
        num_workers=workers,
        # the loader draws a seed for its workers: from its own generator, not from the model's
        generator=torch.Generator().manual_seed(0),
    )
    for numbers in loaded(loader):
        progress.advance(len(numbers))


class _Tried(Dataset[int], Generic[F]):
    """Files that are read when they are asked for; what comes is their number."""

    def __init__(self, files: Sequence[F], try_one: Callable[[F], object]) -> None:
        self._files, self._try_one = files, try_one

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> int:
        self._try_one(self._files[number])
        return number


def loaded(loader: DataLoader[T]) -> Iterator[Any]:
    """What a loader gives; what one of its workers raises comes as it would without workers.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        yield from loader
    except ValueError as error:
        # torch hands over the whole traceback as the message
        before, _, own = str(error).rpartition("\nValueError: ")
        if before:
            raise ValueError(own.strip()) from error
        raise
