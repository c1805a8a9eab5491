"""Which factors the kernels of a low-rank update are for; tells without Triton."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

# Columns of a factor: beyond these registers spill, and a library's product is the better one
MOST_COLUMNS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
)
