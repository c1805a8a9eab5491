"""The forward and the backward of a model as Inductor is given them to generate code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx


class _Captured(Exception):
    """Both graphs are there; nothing has to run."""


def graphs_of(model: nn.Module, images: Tensor, autocast: bool) -> tuple[fx.GraphModule, ...]:
    """Trace and partition a training step, without computing anything.

    Args:
        model: on the CPU, in training mode.
        images: a batch; its values play no part.
        autocast: to bf16.

    Returns:
        Forward and backward, of fake tensors on the CPU.
    """
    found: dict[bool, fx.GraphModule] = {}

    def compile_inner(
        graph: fx.GraphModule, inputs: Any, is_backward: bool = False, **others: Any
    ) -> Any:
        found[is_backward] = graph

        def stop(arguments: Any) -> Any:
            raise _Captured

        stop._boxed_call = True  # type: ignore[attr-defined]
        return stop

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=compile_inner)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    backward_too = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    try:
        with backward_too, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled(images)
    except _Captured:
        pass
    return found[False], found[True]
