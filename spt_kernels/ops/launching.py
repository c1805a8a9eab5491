"""When a backward may call the launcher of an op itself, past the dispatcher's round trip."""

from __future__ import annotations

import torch
from torch import Tensor


def may_launch(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems, and nobody listens: no fake, no subclass, no compiler.

    The registered ops are for those; each costs a second dispatch and a guard, more than all that
    an autograd function does else.
    """
    return (
        not torch.compiler.is_compiling()  # first: what traces stops here
        and type(tensor) is Tensor
        and (tensor.is_cpu or tensor.is_cuda)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )
