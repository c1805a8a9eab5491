"""Tensors that say they are on `cuda:0`, refuse what a card refuses, and hold their values on the
CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CARD = torch.device("cuda:0")
_aten: Any = torch.ops.aten
_WIDE_PRODUCTS = {_aten.mm.dtype, _aten.bmm.dtype}
# Calls whose arguments may lie on both sides, and indices, which a card's tensor takes from the CPU
_ACROSS = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
    _aten._unsafe_index_put.default,
}
# What C++ makes in a backward for a gradient that is to have its parameter's strides
_GRADIENTS_OWN = {_aten.empty_strided.default, _aten.new_empty_strided.default}
# Calls that make the host wait until it has seen values
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default}


class OnCard(Tensor):
    """A tensor on the pretended card.

    To C++ it is one on the CPU, so that autograd and autocast run as they are; Python, which is
    where this package decides what goes where, is told of the card.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        """Around a plain CPU tensor."""
        made: OnCard = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("cpu"),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy: Any = OnCard(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # as if loaded with `map_location="cpu"`

    @property  # type: ignore[override]
    def data(self) -> Any:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, OnCard):
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self.held = value.held
        else:
            become(self, value)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, memory_format = torch._C._nn._parse_to(
            *[a for a in args if not isinstance(a, Tensor)],
            **{k: v for k, v in kwargs.items() if k != "copy"},
        )
        for other in (a for a in args if isinstance(a, Tensor)):
            device, dtype = other.device, other.dtype
        same = device is None or device.type == CARD.type
        if same and dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        more = {"memory_format": memory_format} if memory_format is not None else {}
        Pretence.leaving = not same
        try:
            return _aten._to_copy.default(self, dtype=dtype, **more)
        finally:
            Pretence.leaving = False

    def cpu(self, *_: Any) -> Any:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Any:
        return self

    def pin_memory(self, *_: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        Pretence.wait()
        return self.held.tolist()


def swap(first: Tensor, second: Tensor) -> None:
    """`torch.utils.swap_tensors`, also of tensors that something refers to weakly."""
    names = "__class__", "__dict__"
    for name in names:
        ours, theirs = getattr(first, name), getattr(second, name)
        setattr(first, name, theirs)
        setattr(second, name, ours)
    torch._C._swap_tensor_impl(first, second)


def become(parameter: Any, value: Tensor) -> None:
    """Give a parameter the data of a tensor on the other side; it stays the object that it is."""
    swap(parameter, torch.nn.Parameter(value.data, parameter.requires_grad))  # a version of its own


class Pretence(TorchDispatchMode):
    """Lets factories and copies name the card while it is entered."""

    waits = 0  # how often the host has waited for values
    refused: int | str = 0  # the mode of debugging in which a wait raises
    recorder: Any = None  # of the graph that is being captured
    replays = False  # whether a graph is being replayed
    leaving = False  # whether Python has asked for a copy on the CPU

    @classmethod
    def wait(cls) -> None:
        """The host waits, where that is allowed."""
        if cls.recorder is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if cls.refused in (2, "error"):
            raise RuntimeError("called a synchronizing CUDA operation")
        cls.waits += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call on the tensors that are held, the result on the card if a card would have it there.

    Raises:
        RuntimeError: tensors, or a tensor and a generator, are on different devices.
    """
    target = kwargs.get("device")
    if func is _aten._to_copy.default and isinstance(args[0], OnCard):
        # C++, to which it is on the CPU, may ask for that in a backward, and means where it is
        target = "cpu" if Pretence.leaving else CARD
    in_backward = torch._C._current_graph_task_id() != -1
    # a step on fake tensors, for an account of memory, runs on the CPU wherever the model is
    if func in _GRADIENTS_OWN and in_backward and active_fake_mode() is None:
        target = CARD
    tensors = tensors_in((args, kwargs) if kwargs else args)
    on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
    if target is None and not on_card and "generator" not in kwargs:
        return func(*args, **kwargs)  # most calls, of a model that is on the CPU
    _check_devices(func, args, kwargs, tensors)
    if func in _WAITS and on_card:
        Pretence.wait()
    goes_to_card = on_card if target is None else torch.device(target).type == CARD.type
    leaves = func is _aten._to_copy.default and on_card and not goes_to_card
    if leaves and not kwargs.get("non_blocking", False):
        Pretence.wait()
    if func is _aten.copy_.default and on_card and not isinstance(args[0], OnCard):
        Pretence.wait()
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held_args, held_kwargs = mapped(_held, args), mapped(_held, kwargs)
    if func.namespace == "spt" and on_card:
        result = _run_own(func, held_args, held_kwargs)
        if not Pretence.replays:  # which no version tells of
            torch.autograd.graph.increment_version(_written(func, args))
    elif func in _WIDE_PRODUCTS:  # which a CPU does not have
        left, right, dtype = held_args
        result = torch.matmul(left.to(dtype), right.to(dtype))
    else:
        result = func(*held_args, **held_kwargs)
    if not goes_to_card:
        return result
    given = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnCard)}
    result = mapped(lambda leaf: given[id(leaf)] if id(leaf) in given else _wrapped(leaf), result)
    if func.namespace == "aten" and on_card:
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def tensors_in(containers: tuple[Any, ...]) -> list[Tensor]:
    """Those among the arguments of a call.

    As `torch.utils._pytree` has them, of the containers that calls of operators know, in a tenth of
    its time: this runs for each operator of each step on the card.
    """
    found: list[Tensor] = []
    rest: list[Any] = [containers]
    while rest:
        parts = rest.pop()
        for part in parts.values() if isinstance(parts, dict) else parts:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, (tuple, list, dict)):
                rest.append(part)
    return found


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with every leaf changed."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(change, part) for part in value])
    if kind is dict:
        return {key: mapped(change, part) for key, part in value.items()}
    return change(value)


def _written(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that an op writes into, by its schema."""
    named = zip(args, func._schema.arguments, strict=False)
    return tensors_in(
        tuple(part for part, own in named if own.alias_info and own.alias_info.is_write)
    )


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnCard) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnCard(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, OnCard) else leaf


def _run_own(func: Any, args: Any, kwargs: Any) -> Any:
    """An op of this package: its kernel for CUDA where Triton is interpreted, else that for CPU."""
    import triton

    if not triton.knobs.runtime.interpret:
        return func(*args, **kwargs)
    return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)


def _check_devices(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> None:
    on_card = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    generator = kwargs.get("generator")
    if generator is not None:
        drawn = kwargs.get("device") or (CARD if on_card else torch.device("cpu"))
        if torch.device(drawn).type != generator.device.type:
            raise RuntimeError(
                f"{func}: expected a {torch.device(drawn).type!r} generator, got one on "
                f"{generator.device}"
            )
    if not on_card or func in _ACROSS:
        return
    if func in _INDEXED and isinstance(args[0], OnCard):
        tensors = tensors_in((args[0], args[2:]))
    if func is torch.ops.spt.sparse_adamw.default:
        tensors = tensors_in(args[:7])
    # a number on the CPU goes with everything, in a list or beside one
    stray = [t for t in tensors if not isinstance(t, OnCard) and t.dim() > 0]
    if stray:
        raise RuntimeError(
            f"{func}: expected all tensors on the same device, found {CARD} and cpu "
            f"(shape {tuple(stray[0].shape)})"
        )
