"""How much of some scores operators read: for tests and benches that count passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spt_kernels import native


class ScoreReads(TorchDispatchMode):
    """Counts the bytes of given tensors that operators read, views aside."""

    def __init__(self, scores: Iterable[Tensor]) -> None:
        super().__init__()
        own = list(scores)
        self.storages = {score.untyped_storage().data_ptr() for score in own}
        self.n_bytes = sum(score.nbytes for score in own)
        self.bytes_read = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves(args)
        read = [t for t in leaves if isinstance(t, Tensor) and self.is_score(t)]
        if not read:  # what a selection took out of the scores is no score any more
            return out
        if func is torch.ops.spt.top_tau.default:
            assert len(read) == len(args[0])
            self.bytes_read += native.top_tau_bytes_read(*args)
        elif func is torch.ops.aten.index_select.default:
            self.bytes_read += out.numel() * 64  # a cache line for each element
        elif not func.is_view and func is not torch.ops.aten.detach.default:
            self.bytes_read += sum(t.nbytes for t in read)
        return out

    @property
    def passes(self) -> float:
        """How often all scores have been read."""
        return self.bytes_read / self.n_bytes

    def is_score(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages
