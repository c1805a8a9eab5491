"""Where a run computes, and that it computes the same each time."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_DETERMINISTIC: Any = torch.utils.deterministic  # has its flag by a dynamic module class

# What torch says of an operation that it is told to refuse, and of cuBLAS where that came too early
_HAS_NO_FIXED_ORDER = re.compile(r"(\S+) does not have a deterministic implementation")
_CUBLAS_SETTING = "CUBLAS_WORKSPACE_CONFIG"


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
def reproducible(*, strictly: bool = False) -> Iterator[None]:
    """Let torch choose algorithms that give the same bits every time, and undo that afterwards.

    Args:
        strictly: refuse an operation that has none, in place of a warning. Attention on a card has
            one only then: else its kernels add up gradients in an order that is not fixed.

    Raises:
        ValueError: such an operation came, which is named; or cuBLAS was set up otherwise before.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        _DETERMINISTIC.fill_uninitialized_memory,
    )
    # cuBLAS reads it when first used in the process; torch tells by name if it came too late
    is_set = _CUBLAS_SETTING in os.environ
    os.environ.setdefault(_CUBLAS_SETTING, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strictly)
    torch.backends.cudnn.benchmark = False
    _DETERMINISTIC.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        refusal = _refusal(str(error)) if strictly else None
        if refusal is None:
            raise
        raise ValueError(refusal) from error
    finally:
        if not is_set:
            os.environ.pop(_CUBLAS_SETTING, None)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        _DETERMINISTIC.fill_uninitialized_memory = before[3]


def _refusal(message: str) -> str | None:
    """What to say of a message of torch that is about that; None where it is not."""
    found = _HAS_NO_FIXED_ORDER.search(message)
    if found is not None:
        return (
            f"deterministic: torch has no deterministic implementation of {found[1]} here; "
            "where this is not asked for, it only warns of that"
        )
    if _CUBLAS_SETTING in message:
        return (
            "deterministic: set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment, for this "
            "process has multiplied on the card before"
        )
    return None
