"""Tensors that lie in pinned memory of the host and, while they are fetched, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 512  # bytes, as tensors of the caching allocator are aligned


class PinnedTensors:
    """Tensors that lie side by side, so that one copy fetches all of a dtype, and of one as a rule.

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
        buffer: all of that, bytes.
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
            tensors: anywhere; one with gaps in its memory is there without them.
            dtypes: that each is rounded to.
            device: to fetch them to.
            side: the stream to copy on; None copies on the one that computes.
        """
        sizes = dict.fromkeys(dtypes, 0)  # dtype -> bytes of all that are of it
        places = []
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            places.append((tensor, dtype, sizes[dtype]))
            sizes[dtype] += -(-tensor.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = sum(sizes.values())
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        there = dict(zip(sizes, self.buffer.split(list(sizes.values())), strict=True))
        # memory of its own for each dtype: torch.save takes none that holds several
        here = {d: torch.empty(n, dtype=torch.uint8, device="cpu") for d, n in sizes.items()}
        if device.type == "cuda":
            here = {dtype: memory.pin_memory() for dtype, memory in here.items()}
        self._pairs = [(there[dtype], here[dtype]) for dtype in sizes]
        self.on_host, self.on_device = (
            [_view(memory[dtype], offset, dtype, like=t) for t, dtype, offset in places]
            for memory in (here, there)
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
            self._copy(to_host=False)
        else:
            self._home = torch.cuda.current_stream(self.buffer.device)
            self._side.wait_stream(self._home)
            with torch.cuda.stream(self._side):
                self._copy(to_host=False, non_blocking=True)
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
            self._copy(to_host=True)
            return
        self._side.wait_stream(torch.cuda.current_stream(self.buffer.device))
        with torch.cuda.stream(self._side):
            self._copy(to_host=True, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(self._side)

    def _copy(self, *, to_host: bool, non_blocking: bool = False) -> None:
        for there, here in self._pairs:
            target, source = (here, there) if to_host else (there, here)
            target.copy_(source, non_blocking=non_blocking)

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


def _view(memory: Tensor, offset: int, dtype: torch.dtype, *, like: Tensor) -> Tensor:
    part = memory[offset : offset + like.numel() * dtype.itemsize].view(dtype)
    strides = torch.empty_like(like, device="meta").stride()  # its own if it has no gaps
    return part.as_strided(like.shape, strides, part.storage_offset())
