"""A CUDA graph of the pretended card: the calls of a capture, and the tensors that they were on.

As on a card, a capture computes nothing, and a replay repeats the calls with the numbers that the
host gave them then, on whatever now is in the memory that they read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .on_card import OnCard, Pretence

_aten: Any = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}


class PretendedGraph:
    """What of `torch.cuda.CUDAGraph` a capture needs."""

    def __init__(self) -> None:
        self.recorder = _Recorder()
        self.replays = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert Pretence.recorder is None, "a capture within a capture"
        Pretence.recorder = self.recorder
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        Pretence.recorder = None
        self.recorder.undo()

    def pool(self) -> Any:
        return (0, 1)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        Pretence.replays = True
        try:
            for call, made in self.recorder.calls:
                again = list(tree_iter(call()))
                for n, old in made.items():
                    old.held.copy_(getattr(again[n], "held", again[n]))  # perhaps in a backward
        finally:
            Pretence.replays = False


class _Recorder(TorchDispatchMode):
    """Notes each call on the card, which it lets happen and undoes in the end."""

    def __init__(self) -> None:
        super().__init__()
        # each with those of its results that are in memory of their own
        self.calls: list[tuple[Callable[[], Any], dict[int, OnCard]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory -> a tensor there, its values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        on_card = [tensor for tensor in given if isinstance(tensor, OnCard)]
        if func._schema.is_mutable:
            self._keep(on_card)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        random = torch.get_rng_state() if draws else None
        result = func(*args, **kwargs)
        results = {n: t for n, t in enumerate(tree_iter(result)) if isinstance(t, OnCard)}
        if not results and not on_card:
            return result  # work of the host, which happens now
        if func in _COPIES and len(on_card) < len(given):
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during capture")
        if random is not None:
            torch.set_rng_state(random)  # the card's generator moves on in replays
        inputs = {_memory(tensor) for tensor in on_card}
        made = {n: tensor for n, tensor in results.items() if _memory(tensor) not in inputs}
        if made or func._schema.is_mutable:  # others are views
            self.calls.append((partial(func, *args, **kwargs), made))
        return result

    def undo(self) -> None:
        for tensor, values in self._before.values():
            tensor.copy_(values)

    def _keep(self, tensors: list[OnCard]) -> None:
        for tensor in tensors:
            if _memory(tensor) not in self._before:
                storage = tensor.held.untyped_storage()
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[_memory(tensor)] = whole, whole.clone()


def _memory(tensor: OnCard) -> int:
    return tensor.held.untyped_storage().data_ptr()
