"""What a product with a weight of 4 bits holds within itself: the weight as floats."""

from __future__ import annotations

import math
from typing import Any

import torch


def scratch_of_4_bits(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes within `gemm_4bit` of bitsandbytes, 0 of any other operator.

    It makes floats of the whole matrix and multiplies by these, on a CPU always and on a card for
    all but the smallest inputs, in one operator whose meta function knows of the result alone.
    """
    if not func._schema.name.endswith("::gemm_4bit"):
        return 0
    x, _, shape = args[:3]
    dense = math.prod(shape)
    # the linear within is under autocast as well
    is_cast = x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    n_cast = dense + x.numel() if is_cast else 0
    return int(dense * x.element_size() + n_cast * torch.get_autocast_dtype("cpu").itemsize)
