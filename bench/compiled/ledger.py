"""Runs Inductor's code for a card on sizes alone: what is alive when, and what is launched."""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_ROUNDED_TO = 512  # bytes, as torch's allocator rounds
_CALL = re.compile(r"^( *)def call\((?:self, )?args\):\n((?:\1 .*\n|\n)*)", re.M)
_KERNEL = re.compile(r"^(\w+) = async_compile\.triton", re.M)


class Memory:
    """Bytes alive on the card, and the most there were."""

    def __init__(self) -> None:
        self.now_bytes = self.peak_bytes = 0

    def take(self, owner: object, nbytes: int) -> None:
        """Count bytes as long as `owner` is referred to."""
        self.now_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(owner, self._free, nbytes)

    def _free(self, nbytes: int) -> None:
        self.now_bytes -= nbytes


class _Storage:
    """What lives as long as any view of it."""


class Buffer:
    """A tensor without values; views share the `storage`, None for what is counted elsewhere.

    Of a workspace Inductor takes a part, views it and sums it up.
    """

    def __init__(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        storage: Any = None,
        run: CardRun | None = None,
    ) -> None:
        self.shape, self.strides, self.dtype = tuple(shape), tuple(stride), dtype
        self.storage, self.run = storage, run

    def __getitem__(self, part: slice) -> Buffer:
        return self.view(part.stop - part.start)

    def view(self, *shape: Any) -> Buffer:
        """Contiguous, of another shape."""
        sizes = tuple(shape[0]) if isinstance(shape[0], (list, tuple)) else shape
        return Buffer(sizes, contiguous(sizes), self.dtype, self.storage, self.run)

    def sum(self, dim: int) -> Buffer:
        """A launch of torch's own."""
        assert self.run is not None
        self.run.launches["sum"] += 1
        sizes = self.shape[:dim] + self.shape[dim + 1 :]
        return self.run.empty(sizes, contiguous(sizes), self.dtype)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in row-major order."""
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


class CardRun:
    """One run of generated code.

    Attributes:
        memory: what its buffers are counted in.
        launches: of generated kernels (`triton`), of products and other calls by their names.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.launches: Counter[str] = Counter()

    def empty(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, *_: Any
    ) -> Buffer:
        """What `empty_strided_cuda` gives."""
        storage = _Storage()
        reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        nbytes = 0 if 0 in shape else reach * dtype.itemsize
        self.memory.take(storage, math.ceil(nbytes / _ROUNDED_TO) * _ROUNDED_TO)
        return Buffer(shape, stride, dtype, storage, self)

    def run(self, code: str, arguments: list[Any]) -> Sequence[Any]:
        """The results of the `call` in generated code."""
        found = _CALL.search(code)
        assert found is not None
        indent = len(found[1])
        body = "".join(line[indent:] for line in found[2].splitlines(keepends=True))
        names = self._names()
        names |= {name: SimpleNamespace(run=self._launch) for name in _KERNEL.findall(code)}
        exec("def call(args):\n" + body, names)
        results: Sequence[Any] = names["call"](arguments)
        return results

    def _launch(self, *_: Any, **__: Any) -> None:
        self.launches["triton"] += 1

    def _names(self) -> dict[str, Any]:
        cuda = SimpleNamespace(_DeviceGuard=lambda _: nullcontext(), set_device=lambda _: None)
        dtypes = {name: getattr(torch, name) for name in dir(torch) if _is_plain(name)}
        return {
            "torch": SimpleNamespace(cuda=cuda, ops=_Calls(self._fall_back), **dtypes),
            "aten": _Calls(self._fall_back, "aten"),
            "extern_kernels": _Calls(self._call_library),
            "inductor_ops": _Calls(self._fall_back, "inductor"),
            "empty_strided_cuda": self.empty,
            "empty_strided_cpu": Buffer,
            "reinterpret_tensor": lambda b, shape, stride, offset=0: Buffer(
                shape, stride, b.dtype, b.storage, b.run
            ),
            "get_raw_stream": lambda _: 0,
            "assert_alignment": lambda *_: None,
            "assert_size_stride": lambda *_: None,
            "device": torch.device,
            "inf": math.inf,
            "nan": math.nan,
        }

    def _call_library(self, name: str, *arguments: Any, out: Any = None, **options: Any) -> Any:
        self.launches[name] += 1
        if out is not None:
            return None
        if name == "convolution":  # by keywords, in aten's order
            order = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
            bias, *rest = (options[key] for key in ("bias", *order))
            return self._results(torch.ops.aten.convolution, *arguments, bias, *rest)
        return self._results(getattr(torch.ops.aten, name), *arguments, **options)

    def _fall_back(self, name: str, *arguments: Any, **options: Any) -> Any:
        self.launches[name] += 1
        op: Any = torch.ops
        for part in name.split("."):
            op = getattr(op, part)
        return self._results(op, *arguments, **options)

    def _results(self, op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with FakeTensorMode():
            given = [_fake(argument) for argument in arguments]
            made = op(*given, **{key: _fake(value) for key, value in options.items()})
        if isinstance(made, Tensor):
            return self.empty(made.shape, made.stride(), made.dtype)
        if not isinstance(made, (tuple, list)):
            return made
        return [
            self.empty(t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in made
        ]


class _Calls:
    """Anything below a namespace, told by its dotted name when it is called."""

    def __init__(self, call: Callable[..., Any], name: str = "") -> None:
        self._call, self._name = call, name

    def __getattr__(self, name: str) -> _Calls:
        return _Calls(self._call, f"{self._name}.{name}" if self._name else name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(self._name, *arguments, **options)


def _is_plain(name: str) -> bool:
    return isinstance(getattr(torch, name), (torch.dtype, torch.memory_format, torch.layout))


def _fake(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return [_fake(item) for item in value]
    if not isinstance(value, Buffer):
        return value
    return torch.empty_strided(tuple(value.shape), tuple(value.strides), dtype=value.dtype)
