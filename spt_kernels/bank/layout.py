"""Which modules of a model take a batch as samples one after another, found by running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_COMPARED = 64  # elements of each row of an input or output, its last
_TOLERANCE = 0.05  # of their norm: rounding is far below, another order of samples far above


class _Call(NamedTuple):
    """What one call of a module was given, and what it gave."""

    problem: str
    input: tuple[tuple[int, ...], Tensor]  # shape; a few elements of each row, fp32
    output: tuple[tuple[int, ...], Tensor]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a model calls its modules.

    Attributes:
        problems: module name -> why its call cannot be parted by samples; none for the others.
        last: names of modules whose output is that of the model.
    """

    problems: Mapping[str, str]
    last: frozenset[str]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, like: Tensor) -> Layout:
        """Run a model on two random samples, together and one by one, and compare.

        A module serves a batch of several tasks where, in each of its calls, the rows of its input
        and of its output for two samples are those for the first, then those for the second.

        Args:
            model: in eval mode.
            like: a batch of the shape, dtype and device that the model takes.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn((2, *like.shape[1:]), generator=generator, device="cpu")
        pair = noise.to(like.device, like.dtype)
        modules = {name: m for name, m in model.named_modules() if next(m.children(), None) is None}
        last: set[str] = set()
        together = _calls(model, modules, pair, last)
        alone = [_calls(model, modules, sample[None], set()) for sample in pair]
        problems = {}
        for name in modules:
            problem = _problem(together[name], alone[0][name], alone[1][name])
            if problem:
                problems[name] = problem
        return cls(problems, frozenset(last))


def _calls(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Tensor, last: set[str]
) -> dict[str, list[_Call]]:
    found: dict[str, list[_Call]] = {name: [] for name in modules}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            found[name].append(_call(args, kwargs, output))
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in modules.items()]
    try:
        result = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    last.update(name for name, output in outputs.items() if output is result)
    return found


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Call:
    nothing = (), torch.empty(0, device="cpu")
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return _Call("it is called with more than a batch", nothing, nothing)
    for tensor in (args[0], output):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            return _Call("it takes or gives something else than a batch", nothing, nothing)
    return _Call("", _picture(args[0]), _picture(output))


def _picture(batch: Tensor) -> tuple[tuple[int, ...], Tensor]:
    return tuple(batch.shape), batch.detach().flatten(1)[:, -_COMPARED:].float()


def _problem(together: list[_Call], first: list[_Call], second: list[_Call]) -> str:
    if not together:
        return "the model does not call it, but reads its parameters"
    if not len(together) == len(first) == len(second):
        return "how often it is called hangs on the batch"
    for pair, *each in zip(together, first, second, strict=True):
        if pair.problem:
            return pair.problem
        for whole, *parts in (
            (pair.input, *[c.input for c in each]),
            (pair.output, *[c.output for c in each]),
        ):
            shape, rows = whole
            alone = torch.cat([part[1] for part in parts])
            if rows.shape != alone.shape or any(part[0][1:] != shape[1:] for part in parts):
                return "its rows are not the samples of the batch"
            if not (rows - alone).norm() <= _TOLERANCE * alone.norm():
                return "its rows are in another order than the samples, or depend on each other"
    return ""
