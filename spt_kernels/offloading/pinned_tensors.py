"""Tensors that lie in one pinned buffer on the host and, while they are fetched, on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 512  # bytes, as tensors of the caching allocator are aligned


class PinnedTensors:
    """Tensors of one buffer, so that one copy fetches all of them.

    The buffer on the device is there at all times; its memory is not. What autograd has saved of it
    (a weight, or the transpose of one) stays valid from one fetch to the next, as the storage is
    the same: it is emptied, and filled again before the backward reads it. That is how FSDP frees
    gathered weights (Zhao et al., VLDB 2023).

    On a card, a copy runs on a stream of its own. The memory is taken and given back on the stream
    that computes, so that the allocator may hand it on at once: the copy waits for what that stream
    had been given before, and what it is given next waits for the copy.

    Attributes:
        on_host: the tensors on the host, `pinned` for a card.
        on_device: views of the buffer on the device, empty of memory unless `is_there`.
        buffer: on the device, bytes.
        is_there: whether the buffer has its memory, and has its values or will.
        fetched_bytes: how many bytes were copied to the device so far.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        side: Any = None,
    ) -> None:
        """Copy tensors to the host.

        Args:
            tensors: dense, anywhere.
            dtypes: that each is rounded to.
            device: to fetch them to.
            side: the stream to copy on; None copies on the one that computes.
        """
        sizes = [math.prod(t.shape) * d.itemsize for t, d in zip(tensors, dtypes, strict=True)]
        offsets, total = [], 0
        for size in sizes:
            offsets.append(total)
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        places = list(zip(offsets, sizes, dtypes, tensors, strict=True))
        host = torch.empty(total, dtype=torch.uint8)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self.buffer = torch.empty(total, dtype=torch.uint8, device=device)
        self.nbytes = total
        self.on_host, self.on_device = (
            [
                _view(flat[offset : offset + size], dtype, like=tensor)
                for offset, size, dtype, tensor in places
            ]
            for flat in (self._host, self.buffer)
        )
        for view, tensor in zip(self.on_host, tensors, strict=True):
            view.copy_(tensor.detach())
        self._side = side
        self._arrival: Any = None  # an event: the copy is over
        self._home: Any = None  # the stream that the memory is taken and given back on
        self.is_there, self.fetched_bytes = True, 0
        self.release()

    def fetch(self) -> bool:
        """Begin to copy the values to the device; False if they are there."""
        if self.is_there:
            return False
        self.buffer.untyped_storage().resize_(self.nbytes)
        if self._side is None:
            self.buffer.copy_(self._host)
        else:
            self._home = torch.cuda.current_stream(self.buffer.device)
            self._side.wait_stream(self._home)
            with torch.cuda.stream(self._side):
                self.buffer.copy_(self._host, non_blocking=True)
                self._arrival = torch.cuda.Event()
                self._arrival.record(self._side)
        self.is_there = True
        self.fetched_bytes += self.nbytes
        return True

    def wait(self) -> None:
        """Let what the current stream is given from here on see the values."""
        if self._arrival is not None:
            stream = torch.cuda.current_stream(self.buffer.device)
            stream.wait_event(self._arrival)
            if stream != self._home:
                self.buffer.record_stream(stream)

    def put_back(self) -> None:
        """Begin to copy the values back to the host; `release` waits for that."""
        if self._side is None:
            self._host.copy_(self.buffer)
            return
        self._side.wait_stream(torch.cuda.current_stream(self.buffer.device))
        with torch.cuda.stream(self._side):
            self._host.copy_(self.buffer, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(self._side)

    def release(self) -> None:
        """Give the memory on the device back."""
        if self.is_there:
            self.wait()  # for what is on its way still, there unused, or back
            self.buffer.untyped_storage().resize_(0)
            self.is_there, self._arrival, self._home = False, None, None


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _view(part: Tensor, dtype: torch.dtype, *, like: Tensor) -> Tensor:
    part = part.view(dtype)
    return part.as_strided(like.shape, like.stride(), part.storage_offset())
