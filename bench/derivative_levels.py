"""Derives the four levels that a derivative of 2 bits has: `python -m bench.derivative_levels`.

They minimise E (f'(X) - level)² over a standard normal X, that is they are the Lloyd-Max quantiser
(Max 1960, Lloyd 1982) of f'(X): each level is the mean of what it stands for, so that the error
has mean zero, and a value goes to the nearest level. Where f'(-x) = 1 - f'(x), as of every function
here, so are the levels: 1 - b, 1 - a, a, b with boundaries at x = -c, 0, c, where c is the point at
which f' reaches (a + b) / 2. As that lies below 1, which f' has in the limit, f' passes it once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from spt_kernels.ops.encode_derivative import FUNCTIONS, TWO_BITS

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
_FAR = 12.0  # beyond it the density of a standard normal is below 1e-32


def derivative(function: str) -> Callable[[Array], Array]:
    """f' by autograd in float64."""

    def at(x: Array) -> Array:
        leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(FUNCTIONS[function](leaf).sum(), leaf)
        return slope.numpy()

    return at


def lloyd_max(slope: Callable[[Array], Array]) -> tuple[float, float, float]:
    """The boundary c, and the levels a and b within and beyond it, by Lloyd's iteration."""
    a, b = 0.7, 1.0
    boundary = 0.0
    while True:
        boundary = _where(slope, (a + b) / 2)
        new = _mean(slope, 0.0, boundary), _mean(slope, boundary, _FAR)
        if abs(new[0] - a) + abs(new[1] - b) < 1e-14:
            return boundary, *new
        a, b = new


def expected_square(slope: Callable[[Array], Array], c: float, a: float, b: float) -> float:
    """E (f'(X) - level)² with the boundary c and the levels a and b."""
    within = _integral(lambda x: (slope(x) - a) ** 2, 0.0, c)
    return 2 * (within + _integral(lambda x: (slope(x) - b) ** 2, c, _FAR))


def _where(slope: Callable[[Array], Array], value: float) -> float:
    """The x in [0, 1.2] with slope(x) = value; f' rises there."""
    low, high = 0.0, 1.2
    for _ in range(50):
        middle = (low + high) / 2
        is_below = slope(np.array([middle]))[0] < value
        low, high = (middle, high) if is_below else (low, middle)
    return low


def _mean(slope: Callable[[Array], Array], low: float, high: float) -> float:
    return _integral(slope, low, high) / _integral(np.ones_like, low, high)


def _integral(function: Callable[[Array], Array], low: float, high: float) -> float:
    """∫ function(x) φ(x) dx, by Gauss and Legendre."""
    x = (high - low) / 2 * _NODES + (high + low) / 2
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    return float((high - low) / 2 * (_WEIGHTS * function(x) * density).sum())


def main() -> None:
    """Print what is found beside what is shipped."""
    for function in FUNCTIONS:
        slope = derivative(function)
        found = lloyd_max(slope)
        rms = expected_square(slope, *found) ** 0.5
        told = ", ".join(f"{value:.10f}" for value in found)
        print(f"{function}: c, a, b = {told} (shipped {TWO_BITS[function]}); rms error {rms:.4f}")


if __name__ == "__main__":
    main()
