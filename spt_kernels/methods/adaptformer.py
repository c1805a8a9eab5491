"""A bottleneck beside the MLP of every block (AdaptFormer, Chen et al., 2022).

`MLP(x) + s · ReLU(x W_down) W_up` with `s = 0.1` and `x` what the MLP is given, which comes from
the block's norm: the paper's Equation 4. (Its code takes the tokens before that norm.) Where a
block scales what its MLP gives, or drops it in training, the bottleneck's output is scaled and
dropped with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.structured import NEW
from ..tuning import replace_module
from .matrices import block_matrices, blocks_of
from .method import Method
from .tunable import Tunable, counted, freeze_backbone

DEFAULT_WIDTH = 64
SCALE = 0.1


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Put a `ParallelMlp` in the place of each block's MLP, of width 64 where there is room for it.

    Raises:
        ValueError: a block has no `mlp` with linear layers, or the bottleneck would be wider than
            its input.
    """
    sizes = {block: _sizes(model, method, block) for block in blocks_of(model)}
    most = min(size for both in sizes.values() for size in both)
    width = min(DEFAULT_WIDTH, most) if method.rank is None else method.rank
    if width > most:
        raise ValueError(f"rank: expected a width of at most {most}, got {width}")
    freeze_backbone(model, method.head)
    for block, (inner, outer) in sizes.items():
        name = f"{block}.mlp"
        mlp = model.get_submodule(name)
        replace_module(model, name, ParallelMlp(mlp, inner, outer, width))
    return counted(model, head=method.head)


def _sizes(model: nn.Module, method: Method, block: str) -> tuple[int, int]:
    """Features that the MLP of a block takes and gives."""
    inside = f"{block}.mlp."
    matrices = block_matrices(model, method.head)
    shapes = [what.shape for name, what in matrices.items() if name.startswith(inside)]
    if not shapes:
        raise ValueError(
            f"method: AdaptFormer needs blocks with an mlp of linear layers, {block} of "
            f"{type(model).__name__} has none"
        )
    return shapes[0][1], shapes[-1][0]


class ParallelMlp(nn.Module):
    """An MLP with a bottleneck beside it, which starts at zero.

    Args:
        base: the MLP; frozen.
        in_features: of its input's last dimension.
        out_features: of its output's.
        width: of the bottleneck.
    """

    def __init__(self, base: nn.Module, in_features: int, out_features: int, width: int) -> None:
        super().__init__()
        self.base = base
        device = next(base.parameters()).device
        # drawn on the CPU, the same on every device; in fp32 whatever the model is in
        self.down = nn.Linear(in_features, width, **NEW)
        self.up = nn.Linear(width, out_features, **NEW)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.down.to(device)
        self.up.to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, the bottleneck in its own precision."""
        y: Tensor = self.base(x, *args, **kwargs)
        low = torch.relu(self.down(x.to(self.down.weight.dtype)))
        return y + (SCALE * self.up(low)).to(y.dtype)
