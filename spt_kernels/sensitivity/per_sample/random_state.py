"""What is drawn at random while samples are only looked at, and will be drawn again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def forked_random_state(parameters: Iterable[Tensor]) -> Iterator[None]:
    """What is drawn in a `with` block, on the host or where these are, is drawn again after it."""
    devices = sorted({p.device for p in parameters if p.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices):
        yield
