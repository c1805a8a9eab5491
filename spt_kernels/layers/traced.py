"""What a compiler is told of a backward: which of its values are to be made again, not kept."""

from __future__ import annotations

import torch
from torch import Tensor


def made_again(tensor: Tensor) -> Tensor:
    """A tensor of the forward as a backward's product should take it; itself where none compiles.

    The partitioner of `torch.compile` keeps whatever a product of the backward reads (it calls that
    materialized in the backward and never makes it again), a LayerNorm's or GELU's output too,
    beside the input that their own backward keeps. An elementwise call in between lets it weigh
    one against the other. It must not be one that compilers remove, as a copy; the code that makes
    the tensor again takes it up.
    """
    return torch.maximum(tensor, tensor) if torch.compiler.is_compiling() else tensor
