"""What is tunable in a model: by what each kind of parameter is measured and tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..model import (
    HeadPatterns,
    describe,
    head_names,
    is_pointwise,
    possible_names,
    stem_names,
)
from ..model.quantized import floating_parameters, quantized_names
from .per_sample.calls import Calls
from .per_sample.interception import Interception
from .per_sample.stand_in import stand_ins
from .per_sample.watched import pieces_of

Measured = Literal["in batches", "one by one", "not reached", "no"]
Takes = Literal["LoRA, Adapter, entries", "entries", "all of it", "nothing"]

_SAMPLES = 2
_FROZEN = "frozen, or included"
_KINDS = {
    "linear": "Linear",
    "quantized": "quantized Linear",
    "pointwise": "1×1 convolution",
    "functional": "matrix that the model reads itself",
    "conv2d": "other convolution",
    "norm": "norm",
    "bias": "bias",
    "other": "token, table or scale",
    "packed": "quantized, of no Linear",
    "stem": "stem",
    "head": "head",
}


@dataclass(frozen=True)
class Share:
    """Parameters of one kind with one fate.

    Attributes:
        kind: of the parameters, in words; or the head or stem that they are of.
        tensors: how many.
        numel: numbers in them.
        measured: how `measure_sensitivity` does: `"in batches"`, `"one by one"` (exactly too, and
            slowly), `"not reached"` by a forward, so that they score 0, or `"no"`.
        takes: what a plan may put on them.
        why: they are frozen, or trained without a plan; empty for others.
    """

    kind: str
    tensors: int
    numel: int
    measured: Measured
    takes: Takes
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def account_of(
    model: nn.Module, forward: Callable[[], Any], head: HeadPatterns | None = None
) -> tuple[Share, ...]:
    """Every parameter of a model by kind and fate.

    How each is measured is told by one forward pass. What only values tell is not seen: a layer
    that mixes the samples of a batch shows itself to `measure_sensitivity` alone.

    Args:
        model: plain, in evaluation mode; fake tensors will do.
        forward: runs it once, on two samples.
        head: as `head_names` has it: by name, unless it is given.

    Raises:
        ValueError: the model has nothing to tune.
    """
    info = describe(model)
    last = set(head_names(model, head))
    stem = set(stem_names(model))
    candidates = set(possible_names(model, head=head))
    quantized = quantized_names(model)
    with stand_ins(model):
        seen = _seen(model, forward)
    shares: dict[tuple[str, Measured, Takes, str], list[int]] = {}
    for name, what in info.items():
        kind: str = what.read().kind if name in seen.read else what.kind
        measured: Measured = "no"
        takes: Takes = "nothing"
        why = ""
        if name in last:
            kind, takes, why = "head", "all of it", "whole, in any case"
        elif name in stem:
            kind, why = "stem", _FROZEN
        elif name in candidates:
            measured = seen.measured(name)
            modules = kind in ("linear", "pointwise")
            kind = "quantized" if name in quantized else kind
            if measured == "not reached":
                why = "frozen: the model never uses it"
            else:
                takes = "LoRA, Adapter, entries" if modules else "entries"
        elif kind == "other" and name in quantized:
            kind, why = "packed", "frozen: nothing can be trained beside it"
        else:
            why = _FROZEN if kind == "other" else "frozen: shared by several layers"
        key = (_KINDS[kind], measured, takes, why)
        shares.setdefault(key, []).append(what.numel)
    order = list(_KINDS.values())
    found = [
        Share(kind, len(sizes), sum(sizes), measured, takes, why)
        for (kind, measured, takes, why), sizes in shares.items()
    ]
    return tuple(sorted(found, key=lambda share: order.index(share.kind)))


@dataclass(frozen=True)
class _Seen:
    """What a forward has shown of parameters, by name.

    Attributes:
        used: by any call.
        unrecognized: by one that cannot be observed.
        read: weights of layers that the model does not use by calls alone.
    """

    used: frozenset[str]
    unrecognized: frozenset[str]
    read: frozenset[str]

    def measured(self, name: str) -> Measured:
        if name in self.unrecognized:
            return "one by one"
        return "in batches" if name in self.used else "not reached"


def _seen(model: nn.Module, forward: Callable[[], Any]) -> _Seen:
    parameters = floating_parameters(model)
    layers = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_pointwise(module)
    }
    calls = Calls(layers.values())
    used: set[str] = set()

    def note(value: Tensor) -> None:
        calls.note_use(value)
        used.update(piece.name for piece in pieces_of(value))

    interception = Interception(parameters, [*parameters.values(), *model.buffers()])
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        watching = interception.watching(parameters, _SAMPLES, lambda arrival: None, on_use=note)
        with torch.enable_grad(), calls.following(), watching:
            forward()
    finally:
        for name, flag in before.items():
            parameters[name].requires_grad_(flag)
    read = {name for name, module in layers.items() if module not in calls.called}
    return _Seen(frozenset(used), frozenset(interception.unrecognized), frozenset(read & used))
