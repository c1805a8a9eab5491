"""Where in a graph the fused attention is that a module's output comes from."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter

_STEPS_FROM_ATTENTION = 24  # reshapes, a norm, gates, a product, an Adapter, dropout


def attention_of(output: Any) -> tuple[Any, bool]:
    """The last node of a fused attention that an output comes from, within a few steps.

    Returns:
        The node, or None; and whether there is one of a softmax on the way instead.
    """
    has_softmax = False
    outputs: Any = (t.grad_fn for t in tree_iter(output) if isinstance(t, Tensor))
    seen: set[Any] = set()
    level = [node for node in outputs if node is not None]
    for _ in range(_STEPS_FROM_ATTENTION):
        found = [node for node in level if hasattr(node, "_raw_saved_query")]
        if found:
            return found[0], has_softmax
        has_softmax |= any("Softmax" in node.name() for node in level)
        seen.update(level)
        level = list(
            dict.fromkeys(
                below
                for node in level
                for below, _ in node.next_functions
                if below is not None and below not in seen
            )
        )
    return None, has_softmax
