"""`compare_ways`: several methods in one memory, each by its fastest way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..memory.rows import Rows
from ..methods import Method
from .card import CARDS, Card
from .fit import Fitted, Fitting


@dataclass(frozen=True)
class MethodWay:
    """How to train by a method in a precision.

    Attributes:
        method: its name.
        dtype: `"fp32"` or `"bf16-autocast"`.
        way: the fastest that fits; where none does, the one that takes the least memory.
        fits: whether it does.
        others: ways that a picture shows beside it, where they were asked for.
    """

    method: str
    dtype: str
    way: Fitted
    fits: bool
    others: tuple[Fitted, ...] = ()


def compare_ways(
    model: nn.Module,
    batch_shape: Sequence[int],
    methods: Mapping[str, Method],
    limit_bytes: int,
    *,
    dtypes: Sequence[str] = ("fp32", "bf16-autocast"),
    card: Card = CARDS["RTX 3060"],
    with_others: bool = False,
    on_trial: Callable[[int, str], object] = lambda done, what: None,
    **how: Any,
) -> list[MethodWay]:
    """Look for the fastest way of each method and precision; the fastest of all comes first.

    Those of which nothing fits come last. Methods that choose by sensitivity do so by made-up
    scores. `spt-kernels fit` shows this.

    Args:
        model: plain; not changed. A copy without values is made, which its attributes must allow.
        batch_shape: `(batch, 3, height, width)`.
        methods: that are compared, by the names that they are told by.
        limit_bytes: that the accounted peak of a step may have.
        dtypes: precisions, as `estimate_memory` has them.
        card: whose figures tell how long a step takes.
        with_others: whether to find out about ways that a picture shows beside the best.
        on_trial: called as the search goes on with 1 where a method is done in a precision, with 0
            else, and with what is looked at.
        how: all other arguments of `Fitting`.

    Raises:
        ValueError: a method cannot tune this model, or what `estimate_memory` refuses.
    """
    batch, *image_shape = batch_shape
    rows, found = Rows(model, image_shape), []
    for name, method in methods.items():
        row = rows.of(method)
        for dtype in dtypes:
            told = f"{name}, {dtype}"
            asked = {**how, **row.asked(), "dtype": dtype, "card": card}
            fitting = Fitting(model, tuple(image_shape), batch, **asked)
            way = fitting.fastest(limit_bytes, functools.partial(on_trial, 0, told))
            others = tuple(fitting.ways()) if with_others else ()
            found.append(MethodWay(name, dtype, way or fitting.least(), way is not None, others))
            on_trial(1, told)
    return sorted(found, key=lambda own: (not own.fits, own.way.seconds if own.fits else 0.0))
