"""What the C++ makes of a tensor while it reads it, as csrc/activation.h has it."""

from __future__ import annotations

from typing import NamedTuple

# the numbers of ActivationKind there
GELU, TANH_GELU, LAYER_NORM = 1, 2, 3


class Activation(NamedTuple):
    """How the input of a layer is made of what the producer before it keeps.

    It holds addresses, not tensors, as to make it must cost next to nothing: whoever makes one
    holds the tensors until the last call that it is given to has returned, in a variable of that
    very frame (`PackedInput.held`). They are fp32 and contiguous on a CPU; nobody checks that.

    Attributes:
        kind: 0 for the input itself, else one of the numbers above.
        dtype: number of `DTYPE_NUMBERS`, to which each element is rounded.
        mean: address of `[tokens]`, of a LayerNorm alone, as all that follows; else 0.
        rstd: address of `[tokens]`.
        weight: address of `[in_features]`, or 0 without one.
        bias: address of `[in_features]`, or 0 without one.
    """

    kind: int
    dtype: int
    mean: int = 0
    rstd: int = 0
    weight: int = 0
    bias: int = 0


ITSELF = Activation(0, 0)
