"""When a backward may call the launcher of an op itself, past the dispatcher's round trip."""

from __future__ import annotations

import torch
from torch import Tensor


def may_launch(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: no fake, no subclass, nothing that a compiler traces.

    The registered ops are for those; each costs a second dispatch and a guard, more than all that
    an autograd function does else.
    """
    return type(tensor) is Tensor and not torch.compiler.is_compiling()
