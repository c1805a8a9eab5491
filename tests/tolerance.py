"""The one error budget: at most twice the plain computation's error, plus one rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, plain: Tensor, truth: Tensor, *, factor: float = 2.0, roundings: float = 1.0
) -> None:
    """Fail unless `actual` is about as close to `truth` as `plain` is.

    Args:
        actual: what is under test, any floating dtype.
        plain: the plain torch computation, in the dtype of the inputs.
        truth: the same computation in float64.
        factor: how many times the plain error is allowed.
        roundings: how many come on top; more where numbers are so few that the plain ones may all
            happen to be exact.
    """
    assert actual.shape == truth.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    assert not actual.isnan().any(), "NaN in the result"
    if truth.numel() == 0:
        return
    plain_error = (plain.double() - truth).norm()
    rounding = torch.finfo(actual.dtype).eps * truth.norm()
    error = (actual.double() - truth).norm()
    allowed = factor * plain_error + roundings * rounding
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e} (plain: {plain_error:.3e})"
