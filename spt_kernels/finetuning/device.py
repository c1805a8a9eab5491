"""Where a run computes, and that it computes the same each time."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_DETERMINISTIC: Any = torch.utils.deterministic  # has its flag by a dynamic module class


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is the first GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not here ({torch.cuda.device_count()} GPUs found)")
    return device


def own_cores() -> int:
    """The cores that this process may use, where the system tells; else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """bf16 autocast if `amp` says so, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def seed_everything(seed: int) -> None:
    """Seed every random generator that a model or a data set may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_of(number: int) -> torch.Generator:
    """A generator whose numbers hang on `number` alone, however large that is."""
    return torch.Generator().manual_seed(number % 2**64)


def seed_share(seed: int, epoch: int, rank: int) -> None:
    """Seed what a process draws in an epoch of which it has a share, such as its dropout.

    It draws other numbers than the others, and after a resume, by however many, those of before.
    """
    seed_everything(((seed * 1_000_003 + epoch) * 1_000_003 + rank) % 2**63)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Let torch choose algorithms that give the same bits every time, and undo that afterwards.

    Where it has none it goes on, and warns. So it does for attention on a card, whose kernels sum
    in a fixed order only where torch is told to refuse whatever does not.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        _DETERMINISTIC.fill_uninitialized_memory,
    )
    # cuBLAS reads it when first used in the process; torch warns by name if it came too late
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    _DETERMINISTIC.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        _DETERMINISTIC.fill_uninitialized_memory = before[3]
