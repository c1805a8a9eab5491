"""PEFT's Super-Tuning on every matrix of the blocks: chosen entries, a dense gradient."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..model import backbone_numel
from .matrices import block_matrices
from .method import Method
from .peft_model import peft, tune_by
from .tunable import Tunable


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """The share of all entries that the budget is.

    Raises:
        ValueError: PEFT is not installed, or is older than this.
    """
    library = peft()
    if not hasattr(library, "SupertuningConfig"):
        raise ValueError(f"method: peft {library.__version__} has no Super-Tuning, 0.21 has")
    matrices = block_matrices(model, method.head)
    share = method.count(backbone_numel(model, method.head)) / sum(
        what.numel for what in matrices.values()
    )
    config = functools.partial(library.SupertuningConfig, sparsity=1 - share)
    return tune_by(model, method, config, matrices)
