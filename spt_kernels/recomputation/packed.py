"""What stands in a graph for the tensors that a region saves: kept, made again, a view of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers.autograd.recording import Packed
from ..ops.torch_internals import DisableTorchFunction

_SPARSE = frozenset(
    {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
)


class Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        """That of a tensor."""
        shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        return cls(shape, stride, offset, tensor.dtype, tensor.device)

    def view_of(self, tensor: Tensor) -> Tensor:
        """What lies so in the storage of a tensor of the same dtype."""
        return torch.as_strided(tensor, self.shape, self.stride, self.offset)


class Kept:
    """A tensor as it is; with hooks, autograd itself does not ask whether it was changed."""

    __slots__ = ("_tensor", "_version", "_where")

    def __init__(self, tensor: Tensor, where: str) -> None:
        self._tensor, self._version, self._where = tensor, tensor._version, where

    def read(self) -> Tensor:
        """The tensor; raises where it has been changed."""
        return unchanged(self._tensor, self._version, self._where)


class Elsewhere:
    """A tensor that other saved-tensor hooks, which were in use around the region, keep.

    Args:
        tensor: to be kept.
        hooks: that keep it, and may give it back but once, as those of torch's checkpoints do.
        is_read_often: whether to hold on to what they have given back.
    """

    __slots__ = ("_is_read_often", "_packed", "_tensor", "_unpack")

    def __init__(
        self,
        tensor: Tensor,
        hooks: tuple[Callable[..., Any], Callable[..., Any]],
        *,
        is_read_often: bool = False,
    ) -> None:
        self._packed, self._unpack = hooks[0](tensor), hooks[1]
        self._is_read_often = is_read_often
        self._tensor: Tensor | None = None

    def read(self) -> Tensor:
        """What they give back."""
        if self._tensor is not None:
            return self._tensor
        tensor: Tensor = self._unpack(self._packed)
        if self._is_read_often:
            self._tensor = tensor
        return tensor


class Slot:
    """A tensor that is made again when it is first read, and lives as long as what reads it.

    Args:
        compute_again: fills this slot, and others.
        geometry: of the tensor that was saved.
        tensor: itself, where it is not settled yet whether it is kept.
    """

    __slots__ = ("__weakref__", "_compute_again", "_version", "geometry", "tensor")

    def __init__(
        self, compute_again: Callable[[], None], geometry: Geometry, tensor: Tensor | None
    ) -> None:
        self._compute_again: Callable[[], None] | None = compute_again
        self.geometry = geometry
        self.tensor = tensor
        self._version = 0 if tensor is None else tensor._version

    def read(self) -> Tensor:
        """The tensor; the first time its region is computed again."""
        if self.tensor is None:
            assert self._compute_again is not None
            self._compute_again()
            assert self.tensor is not None
        return unchanged(self.tensor, self._version, "a region that was computed again")

    def fill(self, tensor: Tensor) -> None:
        """Take what the second forward has made; it lies as what the first had made."""
        self.tensor, self._version = tensor, tensor._version

    def stay(self) -> None:
        """Keep the tensor: it need not be made again."""
        self._compute_again = None


class View:
    """Another view of what is made again, by a region or by a norm."""

    __slots__ = ("_geometry", "_source")

    def __init__(self, source: Packed, geometry: Geometry) -> None:
        self._source, self._geometry = source, geometry

    def read(self) -> Tensor:
        """The view."""
        return self._geometry.view_of(self._source.read())


def unchanged(tensor: Tensor, version: int, where: str) -> Tensor:
    """The tensor; raises where its values are not those of that version any more."""
    if tensor._version != version:
        raise RuntimeError(
            f"{where}: a tensor of shape {tuple(tensor.shape)} that the backward needs was changed "
            f"in place since the forward (version {tensor._version}, expected {version})"
        )
    return tensor


def has_storage(tensor: Tensor) -> bool:
    """Whether it lies in one; a sparse tensor is made of others."""
    return tensor.layout not in _SPARSE


def alone(tensor: Tensor) -> Tensor:
    """A tensor without the graph that it comes from, which holds on to what is packed."""
    return tensor.detach() if tensor.requires_grad else tensor


def unobserved() -> Any:
    """Keeps function modes, as those that watch which parameters a model uses, out of what follows.

    To ask a parameter for its version is a call of a function of torch to them.
    """
    return DisableTorchFunction()
