"""Sensitivities for weighing costs where no photographs are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from ..model import (
    HeadPatterns,
    backbone_numel,
    candidate_names,
    describe,
    head_names,
    is_pointwise,
)
from .per_sample.call_names import INERT_CALLS, call_name
from .per_sample.calls import Calls
from .scores import Sensitivity

# Standard deviations of log sensitivity as measured on a small pre-trained ViT and photographs of
# CIFAR-10 (800 samples, 24 matrices): of a matrix's mean, of the means of its rows and of its
# columns, and of what is left in an entry.
MATRIX, ROW, COLUMN, ENTRY = 1.8, 0.9, 0.85, 0.35


def skewed_sensitivity(
    model: nn.Module,
    uncalled: frozenset[str] = frozenset(),
    *,
    head: HeadPatterns | None = None,
) -> Sensitivity:
    """Scores that concentrate in matrices, rows and columns as strongly as measured ones do.

    Args:
        model: plain; its parameters may be on the meta device.
        uncalled: weights of layers that no module can stand for, as `uncalled_weights` names them.
            Without it every Linear and 1×1 convolution is taken for one that the model calls.
        head: as `head_names` has it: by name, unless it is given.
    """
    generator = torch.Generator().manual_seed(0)
    info = describe(model)
    scores = {}
    for name in candidate_names(model, head=head):
        shape = info[name].shape
        log_score = ENTRY * torch.randn(shape, generator=generator)
        log_score += MATRIX * torch.randn((), generator=generator)
        for axis, deviation in zip(range(len(shape)), (ROW, COLUMN), strict=False):
            sizes = [1] * len(shape)
            sizes[axis] = shape[axis]
            log_score += deviation * torch.randn(sizes, generator=generator)
        scores[name] = log_score.exp()
        if name in uncalled and info[name].takes_modules:
            info[name] = info[name].read()
    made = Sensitivity.from_tensors(
        scores,
        num_samples=1,
        info={name: info[name] for name in scores},
        head=head_names(model, head),
        backbone_numel=backbone_numel(model, head),
    )
    return made if head is not None else replace(made, head_source="names")


def uncalled_weights(model: nn.Module, forward: Callable[[], Any]) -> frozenset[str]:
    """Name the weights of the layers that a forward of `model` does not use by calls alone.

    BEiT, EVA-02 and Swin V2 read the weight of `qkv` themselves, so that nothing can stand for the
    layer: `measure_sensitivity` notices the same on samples.

    Args:
        model: plain, in evaluation mode.
        forward: runs it once; a batch of fake tensors does.
    """
    linears = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_pointwise(module)
    }
    calls = Calls(linears.values())
    with torch.enable_grad(), calls.following(), _Uses(calls.note_use):
        forward()
    return frozenset(name for name, module in linears.items() if module not in calls.called)


class _Uses(TorchFunctionMode):
    """Tells of every parameter that a call computes with."""

    def __init__(self, told: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if call_name(func) not in INERT_CALLS:
            for leaf in tree_iter((args, kwargs)):
                if isinstance(leaf, nn.Parameter):
                    self._told(leaf)
        return func(*args, **(kwargs or {}))
