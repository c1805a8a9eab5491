"""`AdapterLinear` and `AdapterConv2d`: a bottleneck on a layer's output, or ranges of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.launching import goes_as_on_card, is_transformed
from .autograd.card_adapter import CardAdapter, is_on_card
from .autograd.row_ranges import groups_on
from .autograd.traced_adapter import FrozenBase, TracedAdapter
from .structured import (
    NEW,
    StructuredConv2d,
    StructuredLayer,
    StructuredLinear,
    add_to_rows,
    rows_of,
)

if TYPE_CHECKING:
    from ..plan import AdapterSpec


class AdapterLayer(StructuredLayer):
    """What an Adapter is, whatever the layer: its parameters."""

    _name_prefix = "Adapter"

    _trained_names = ("down_weight", "down_bias", "up_weight", "up_bias")

    def __init__(self, base: nn.Module, spec: AdapterSpec) -> None:
        self._check_base(base, spec)
        self._start_from(base)
        self.put_on(spec)

    def put_on(self, spec: AdapterSpec) -> None:
        """Put an Adapter on this module, which has the contents of its base layer."""
        self._freeze_for(spec)
        n_rows = sum(stop - start for start, stop in spec.rows)
        self.down_weight = nn.Parameter(torch.empty(spec.rank, n_rows, **NEW))
        self.down_bias = nn.Parameter(torch.empty(len(spec.rows) * spec.rank, **NEW))
        self.up_weight = nn.Parameter(torch.zeros(n_rows, spec.rank, **NEW))
        self.up_bias = nn.Parameter(torch.zeros(n_rows, **NEW))
        with torch.no_grad():
            for _, columns, part in self.__dict__["_spt_ranges"]:
                width = columns.stop - columns.start
                # as nn.Linear starts: its fan-in is the width
                down = torch.empty(spec.rank, width, **NEW)
                self.down_weight[:, columns] = nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                self.down_bias[part].uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))
        self._move_and_tag(self.weight.device)

    def _of_ranges(self, dtype: torch.dtype) -> Iterable[tuple[Tensor, ...]]:
        """What `_new_parameters` gives, in a dtype, of each range.

        All of a parameter is cast and split at once: a slice has, in the backward, a whole gradient
        of its own.
        """
        ranges = self.__dict__["_spt_ranges"]
        cast = [parameter.to(dtype) for parameter in self._new_parameters()]
        if len(ranges) == 1:
            return (tuple(cast),)
        down, down_bias, up, up_bias = cast
        widths = [own.stop - own.start for _, own, _ in ranges]
        rank = [part.stop - part.start for _, _, part in ranges]
        return zip(
            down.split(widths, 1),
            down_bias.split(rank),
            up.split(widths),
            up_bias.split(widths),
            strict=True,
        )

    def _traced_update(
        self, x: Tensor, y: Tensor, rows: slice, own: slice, part: slice
    ) -> tuple[slice, Tensor]:
        """The update of some rows of `y` `[..., out]`, made of `x` `[..., in]`, for a compiler."""
        down, down_bias = self.down_weight[:, own], self.down_bias[part]
        up, up_bias = self.up_weight[own], self.up_bias[own]
        base = FrozenBase(self._traced_weight().flatten(1), self.bias, rows)
        update: Tensor = TracedAdapter.apply(y[..., rows], x, down, down_bias, up, up_bias, base)
        return rows, update


class AdapterLinear(AdapterLayer, StructuredLinear):
    """`y + Up(GELU(Down(y)))` on each of some ranges of the output `y = base(x)`.

    This is the sequential placement of the published code: right after the sensitive matrix, before
    whatever follows it, with biases and an up-projection that starts at zero. An Adapter is not
    linear and cannot be merged into the base layer.

    Attributes:
        weight: of the base layer, frozen; with a sparse delta where that had one.
        down_weight: Parameter `[rank, rows of all ranges]`, fp32.
        down_bias: Parameter `[ranges · rank]`.
        up_weight: Parameter `[rows of all ranges, rank]`, zero at first.
        up_bias: Parameter `[rows of all ranges]`, zero at first.
        spec: the `AdapterSpec`.

    Args:
        base: `nn.Linear`, or a `SparseDeltaLinear`, whose deltas go on being trained here. Weight
            and bias are shared and frozen.
        spec: rank and ranges.

    Raises:
        TypeError: `base` is of another type.
        ValueError: the spec is for a layer of other sizes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output, adapted."""
        ranges = self.__dict__["_spt_ranges"]
        if is_transformed():
            return self._adapted(self._with_deltas(input))
        if torch.compiler.is_compiling():
            y = self._traced_base(input)
            return add_to_rows(y, [self._traced_update(input, y, *places) for places in ranges])
        y = self._with_deltas(input)
        if goes_as_on_card(y):
            spec = self.__dict__["_spt_spec"]
            groups = groups_on(spec.rank, spec.rows)
            if is_on_card(y, groups, spec.rank):
                factors = self._new_parameters()
                adapted: Tensor = CardAdapter.apply(y, *factors, groups[0], self._adapted)
                return adapted
        return self._adapted(y)

    def _adapted(self, y: Tensor) -> Tensor:
        """The base layer's output `[..., out]`, adapted by torch's calls."""
        ranges, updates = self.__dict__["_spt_ranges"], []
        for (rows, _, _), (down, down_bias, up, up_bias) in zip(
            ranges, self._of_ranges(y.dtype), strict=True
        ):
            # what is kept of the rows must not hold on to all of y
            low = F.linear(rows_of(y, rows).contiguous(), down, down_bias)
            updates.append((rows, F.linear(F.gelu(low), up, up_bias)))
        return add_to_rows(y, updates)


class AdapterConv2d(AdapterLayer, StructuredConv2d):
    """`AdapterLinear` on the channels of each position, after a 1×1 convolution of any stride.

    What it holds is as there, with channels for features.

    Args:
        base: `nn.Conv2d` with a 1×1 kernel, without groups and padding, or a `SparseDeltaConv2d`.
        spec: rank and ranges.

    Raises:
        TypeError: `base` is something else.
        ValueError: the spec is for a layer of other sizes.
    """

    def _of_batch(self, x: Tensor) -> Tensor:
        y = self._base(x)
        ranges = self.__dict__["_spt_ranges"]
        if torch.compiler.is_compiling() and not is_transformed():
            tokens = self._tokens(x), y.movedim(1, -1)
            traced = [self._traced_update(*tokens, *places) for places in ranges]
            return add_to_rows(y, [(rows, update.movedim(-1, 1)) for rows, update in traced], 1)
        updates = []
        for (rows, _, _), (down, down_bias, up, up_bias) in zip(
            ranges, self._of_ranges(y.dtype), strict=True
        ):
            low = F.conv2d(rows_of(y, rows, 1), down[..., None, None], down_bias)
            updates.append((rows, F.conv2d(F.gelu(low), up[..., None, None], up_bias)))
        return add_to_rows(y, updates, 1)
