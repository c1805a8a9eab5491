"""How fast this machine can possibly be: the floor beside which a bench is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

READ_BYTES = 256 << 20  # many times any cache
MATRIX = 2048  # large enough for the best rate of a matrix product, 17 GFLOP


@dataclass(frozen=True)
class Speed:
    """The best this machine was seen to do, with torch's own operators.

    Attributes:
        bytes_per_s: read of fp32 from memory, in one stream per thread.
        flops_per_s: fp32 matrix product.
    """

    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, bytes_moved: float, flops: float) -> float:
        """No computation that moves so many bytes and does so many operations takes less."""
        return 1e3 * max(bytes_moved / self.bytes_per_s, flops / self.flops_per_s)


@lru_cache
def measure_speed(device: torch.device) -> Speed:
    """Take the best of several runs: a floor is not to be blamed on a noisy neighbour."""
    data = torch.ones(READ_BYTES // 4, device=device)  # fp32
    matrix = torch.ones(MATRIX, MATRIX, device=device)
    out = torch.empty_like(matrix)
    read_s = min(_best_s(data.sum), _best_s(data.max))
    product_s = _best_s(lambda: torch.mm(matrix, matrix, out=out))
    return Speed(READ_BYTES / read_s, 2 * MATRIX**3 / product_s)


def _best_s(run: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def wait() -> None:
    """Until the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
