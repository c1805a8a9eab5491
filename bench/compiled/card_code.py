"""Inductor's code for an H100 from a graph of tensors on the CPU, where there is no card."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

_CARD = torch.device("cuda:0")
_LIMITS = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}


def code_for_card(graph: fx.GraphModule, is_backward: bool) -> str:
    """The Python that would launch the kernels of `graph`, their Triton included."""
    mode = FakeTensorMode()
    with _pretended_h100(), config.patch(size_asserts=False, benchmark_harness=False):
        moved = _on_card(graph, mode)
        inputs = [node.meta["val"] for node in moved.graph.find_nodes(op="placeholder")]
        with V.set_fake_mode(mode):
            post_grad_passes(moved, False)
            lowering = GraphLowering(
                moved, example_inputs=inputs, is_backward=is_backward, is_inference=False
            )
            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                code: Any = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def _on_card(graph: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """A copy of a graph whose tensors are on the card."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    moved = fx.GraphModule(graph, copied)

    def to_card(value: Any) -> Any:
        if isinstance(value, torch.device):
            return _CARD
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CARD)

    for node in moved.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
        if "val" in node.meta:
            node.meta["val"] = tree_map(to_card, node.meta["val"])
        node.args, node.kwargs = (
            fx.node.map_aggregate(part, to_card) if _has_device(part) else part
            for part in (node.args, node.kwargs)
        )
    moved.recompile()
    return moved


def _has_device(arguments: Any) -> bool:
    values = arguments.values() if isinstance(arguments, dict) else arguments
    return any(isinstance(value, torch.device) for value in values)


@contextlib.contextmanager
def _pretended_h100() -> Iterator[None]:
    """Let Inductor and Triton find an H100 when they ask which card there is."""
    import triton
    from triton.backends.compiler import GPUTarget

    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", minor=0, gcnArchName="", **_LIMITS)
    hints = DeviceProperties(type="cuda", index=0, cc=90, **_LIMITS)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for owner, name, answer in (
            (triton.runtime.driver, "_active", driver),
            (DeviceProperties, "create", lambda *_, **__: hints),
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: properties)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (scheduler, "has_triton", lambda: True),
        ):
            stack.enter_context(patch.object(owner, name, answer, create=True))
        yield
