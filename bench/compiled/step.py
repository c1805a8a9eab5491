"""A compiled training step on a card, accounted: peak memory and launches of each method.

`python -m bench.compiled.step [--model NAME] [--dtype DTYPE] [--batch N] [method ...]`

Graphs are traced and partitioned on the CPU, code is generated as for an H100, and run on sizes
alone. Not in it: workspaces of libraries, the loss, the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from spt_kernels.costs import CostSetting
from spt_kernels.costs.measure import tune_for_costs
from spt_kernels.layers.autograd import sparse_gradient, wide_product

from .card_code import code_for_card
from .graphs import graphs_of
from .ledger import Buffer, CardRun, Memory

METHODS = ("peft-lora-16", "spt-lora", "spt-adapter", "spt-unstructured")


@dataclass(frozen=True)
class CompiledStep:
    """What a step takes.

    Attributes:
        peak_bytes: parameters, activations and gradients.
        kept_bytes: of activations, between forward and backward.
        forward: launches by kind.
        backward: the same.
    """

    peak_bytes: int
    kept_bytes: int
    forward: Counter[str]
    backward: Counter[str]

    @property
    def launches(self) -> int:
        """Of both directions."""
        return self.forward.total() + self.backward.total()


def account(model: nn.Module, images: Tensor, autocast: bool) -> CompiledStep:
    """Account for a compiled training step of a model, on a card that need not be there."""
    with _as_on_card():
        forward, backward = graphs_of(model.train(), images, autocast)
    static = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = Memory()
    first, second = CardRun(memory), CardRun(memory)
    inputs = [_given(node) for node in forward.graph.find_nodes(op="placeholder")]
    results = list(first.run(code_for_card(forward, False), inputs))
    names = [
        getattr(node, "name", "") for node in next(iter(reversed(forward.graph.nodes))).args[0]
    ]
    kept = dict(zip(names, results, strict=True))
    output = results.pop(0)  # which the loss holds
    results.clear()
    kept_bytes = memory.now_bytes
    saved: list[Any] = []
    for node in backward.graph.find_nodes(op="placeholder"):
        value = kept.get(node.name)
        if value is None:
            is_gradient = node.name.startswith("tangents")
            value = _given(node, second) if is_gradient else _given(node)
        saved.append(value)
    value = kept = None  # the call alone holds them, and lets go of them as it goes
    gradients = second.run(code_for_card(backward, True), saved)
    del gradients, output
    return CompiledStep(static + memory.peak_bytes, kept_bytes, first.launches, second.launches)


def _given(node: fx.Node, run: CardRun | None = None) -> Any:
    """An argument of a graph; counted where a run is given to count it."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    make = Buffer if run is None else run.empty
    return make(value.shape, value.stride(), value.dtype)


@contextmanager
def _as_on_card() -> Iterator[None]:
    """Trace on the CPU what a card would trace."""

    def gives_fp32(factor: Tensor) -> bool:
        return factor.element_size() == 2

    with ExitStack() as both:
        for user in (sparse_gradient, wide_product):
            both.enter_context(patch.object(user, "gives_fp32", gives_fp32))
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line of JSON for each method, with its ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", nargs="*", default=METHODS)
    parser.add_argument("--model", default=CostSetting.model)
    parser.add_argument("--model-args", type=json.loads, default={}, help="JSON")
    parser.add_argument("--dtype", default="bf16-autocast", choices=("fp32", "bf16-autocast"))
    parser.add_argument("--batch", type=int, default=CostSetting.batch_size)
    options = parser.parse_args(arguments)
    setting = CostSetting(options.model, options.model_args, options.batch, dtype=options.dtype)
    first: CompiledStep | None = None
    for name in options.method:
        plain = setting.build()
        shape = setting.image_shape(plain)
        images = torch.empty(options.batch, *shape)
        model = tune_for_costs(plain, setting.method(name, plain), shape).model
        step = account(model, images, options.dtype != "fp32")
        first = first or step
        print(
            json.dumps(
                {
                    "method": name,
                    "peak_gib": round(step.peak_bytes / 2**30, 3),
                    "ratio": round(step.peak_bytes / first.peak_bytes, 3),
                    "kept_gib": round(step.kept_bytes / 2**30, 3),
                    "launches": step.launches,
                    "launch_ratio": round(step.launches / first.launches, 2),
                    "forward": step.forward,
                    "backward": step.backward,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
