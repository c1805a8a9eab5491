"""The dtypes that the ops take."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # those that models are trained in
FLOATS_OF_16_BITS = (torch.bfloat16, torch.float16)
FLOATS_AND_FP64 = (*FLOATS, torch.float64)  # in which gradients are checked
