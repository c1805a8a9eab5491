"""An Adapter of width K after the MLP of every block (Houlsby et al., 2019).

There is one per block, on what the MLP gives, as Pfeiffer et al. (2020) and NOAH (Zhang et al.,
2022) put it: on the last Linear or 1×1 convolution that is no gate or shortcut. Of ViT-B/16 width 8
trains 156,768 values, 0.18 % of the backbone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plan import AdapterSpec, Plan
from .matrices import check_rank, last_matrices
from .method import Method
from .tunable import plan_of


def plan(model: nn.Module, method: Method, sensitivity: Any) -> Plan:
    """An Adapter on the last matrix of every block.

    Raises:
        ValueError: the model has no blocks with such layers, or the width is more than one of
            them gives.
    """
    matrices = last_matrices(model, method.head)
    check_rank("method", method.size, (what.shape[:1] for what in matrices.values()))
    structured = {
        f"{name}.weight": AdapterSpec(method.size, ((0, what.shape[0]),))
        for name, what in matrices.items()
    }
    return plan_of(model, structured=structured, head=method.head)
