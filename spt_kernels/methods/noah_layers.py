"""The modules that NOAH puts into a block, each usable at any size up to its own.

Every table of a module has its size as the first dimension, so that a smaller module is the first
rows of a larger one: that is how architectures share weights, and as these rows lie together, a
module that is cut to them computes the same to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.structured import NEW
from .prompted import with_prompts, without_prompts

_QUICK_GELU = 1.702
_FAN = 10  # the largest size of the published space: the bounds are the same for all sizes


class SharedModule(nn.Module):
    """What the three have in common.

    Attributes:
        size: rows in use, at first all; 0 leaves out what the module adds.

    Args:
        size: rows of every table.
        dropout: how likely a value is dropped in training.
        like: a module on the device that the tables are to be on.
    """

    _tables: tuple[str, ...] = ()

    def __init__(self, size: int, dropout: float, like: nn.Module) -> None:
        super().__init__()
        self.size = size
        self.dropout = dropout
        self.training = like.training
        self._device = next((p.device for p in like.parameters()), torch.device("cpu"))

    @property
    def largest(self) -> int:
        """Rows of every table."""
        return len(getattr(self, self._tables[0]))

    def check_size(self, size: int) -> None:
        """Refuse a size that this is too small for."""
        if size > self.largest:
            raise ValueError(f"architecture: expected a size of at most {self.largest}, got {size}")

    @torch.no_grad()
    def cut(self) -> None:
        """Keep copies of the rows in use alone."""
        for name in self._tables:
            kept = getattr(self, name)[: self.size].clone()
            setattr(self, name, nn.Parameter(kept))

    def _drawn(self, rows: int, columns: int, bound: float) -> nn.Parameter:
        """A table of values between plus and minus `bound`, the same on every device."""
        drawn = torch.empty(rows, columns, **NEW).uniform_(-bound, bound)
        return nn.Parameter(drawn.to(self._device))

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self._device))

    def _rows(self, table: Tensor) -> Tensor:
        return table if self.size == len(table) else table[: self.size]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class SharedPrompts(SharedModule):
    """A transformer block with learned tokens of its own, dropped after it (VPT-Deep).

    Attributes:
        prompts: Parameter `[size, width]`, uniform at first, to the bound of Xavier for the largest
            size of the published space.
        block: takes and gives `[batch, tokens, width]`.
        num_prefix: class and register tokens, which stay in front of the prompts.
    """

    _tables = ("prompts",)

    def __init__(
        self, block: nn.Module, size: int, width: int, num_prefix: int, dropout: float
    ) -> None:
        super().__init__(size, dropout, block)
        self.block, self.num_prefix = block, num_prefix
        self.prompts = self._drawn(size, width, math.sqrt(6 / (width * (1 + _FAN))))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block on all tokens and prompts."""
        if not self.size:
            y: Tensor = self.block(x, *args, **kwargs)
            return y
        prompts = self._rows(self.prompts).to(x.dtype).expand(len(x), -1, -1)
        x = with_prompts(x, self._drop(prompts), self.num_prefix)
        return without_prompts(self.block(x, *args, **kwargs), self.size, self.num_prefix)


class SharedLora(SharedModule):
    """`W x + B A x` in place of the layer that computes q, k, v; no scale.

    Attributes:
        base: the layer.
        down: Parameter `[size, in]`, A, uniform at first as a Linear is.
        up: Parameter `[size, out]`, B transposed, zero at first.
    """

    _tables = ("down", "up")

    def __init__(self, base: nn.Linear, size: int, dropout: float) -> None:
        super().__init__(size, dropout, base)
        self.base = base
        self.down = self._drawn(size, base.in_features, 1 / math.sqrt(base.in_features))
        self.up = self._zeros(size, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Base and low-rank path, the latter in its own precision."""
        y: Tensor = self.base(x)
        if not self.size:
            return y
        low = F.linear(self._drop(x.to(self.down.dtype)), self._rows(self.down))
        return y + (low @ self._rows(self.up)).to(y.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The base layer with the product added."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        weight += (self._rows(self.up).t() @ self._rows(self.down)).to(weight.dtype)
        return self.base


class SharedAdapter(SharedModule):
    """`y + Up(QuickGELU(Down(y)))` on what the MLP's branch adds to a block.

    Attributes:
        before: the last module of the branch, its stochastic depth.
        down: Parameter `[size, width]`, uniform at first, to the bound of Xavier for the largest
            size of the published space.
        down_bias: Parameter `[size]`, zero at first.
        up: Parameter `[size, width]`, transposed, as `down`: an Adapter is not nothing at first.
        up_bias: Parameter `[width]`, zero at first; all sizes share it whole.
    """

    _tables = ("down", "down_bias", "up")

    def __init__(
        self, before: nn.Module, size: int, width: int, dropout: float, like: nn.Module
    ) -> None:
        super().__init__(size, dropout, like)
        self.before = before
        bound = math.sqrt(6 / (width + _FAN))
        self.down, self.down_bias = self._drawn(size, width, bound), self._zeros(size)
        self.up, self.up_bias = self._drawn(size, width, bound), self._zeros(width)

    def forward(self, x: Tensor) -> Tensor:
        """What came, adapted in the Adapter's own precision."""
        y: Tensor = self.before(x)
        if not self.size:
            return y
        low = F.linear(y.to(self.down.dtype), self._rows(self.down), self._rows(self.down_bias))
        low = self._drop(low * torch.sigmoid(_QUICK_GELU * low))
        return y + (low @ self._rows(self.up) + self.up_bias).to(y.dtype)
