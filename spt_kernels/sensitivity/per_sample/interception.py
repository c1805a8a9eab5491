"""Finding, while a model runs, every call in which it uses one of the parameters being measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import uses
from .convolution import conv2d
from .remaking import Productions
from .uses import Role, Use

_RECOGNIZED: dict[Any, Callable[..., Use | None]] = {
    F.linear: uses.linear,
    F.conv2d: conv2d,
    F.layer_norm: uses.layer_norm,
    torch.layer_norm: uses.layer_norm,
    F.rms_norm: uses.rms_norm,
    torch.rms_norm: uses.rms_norm,
    F.group_norm: uses.group_norm,
    torch.group_norm: uses.group_norm,
    F.batch_norm: uses.batch_norm,
}
_MULTIPLY = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
_ADD = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
# what only looks at a tensor, or lets no gradient through
INERT_CALLS = frozenset(
    {"shape", "size", "dim", "ndim", "numel", "nelement", "stride", "storage_offset"}
    | {"dtype", "device", "layout", "is_cuda", "is_cpu", "is_floating_point", "is_complex"}
    | {"is_contiguous", "is_nested", "is_sparse", "is_quantized", "element_size", "data_ptr"}
    | {"requires_grad", "is_leaf", "grad", "grad_fn", "detach", "data", "__len__", "__hash__"}
)
# what gives the same numbers in another dtype or, for a vector, with more dimensions of size 1
_CASTS = frozenset(
    {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type_as, Tensor.type}
)
_RESHAPES = frozenset({Tensor.reshape, Tensor.view, Tensor.unsqueeze, torch.reshape})


@dataclass(frozen=True)
class Piece:
    """Parameter `name` as numbers `start:stop` of a vector made of it; None: the whole tensor."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Arrival:
    """What one use of one parameter brings in the backward pass, still to be multiplied out."""

    piece: Piece
    role: Role
    grad_output: Tensor  # [samples, k, ...]
    input: Tensor | None  # [samples, k, ...]


class Interception(TorchFunctionMode):
    """Puts an observer behind every recognized use of `parameters` while it is entered.

    Forward *and* backward must run inside: with activation checkpointing the uses are made again
    in the backward pass.

    Attributes:
        unrecognized: names of parameters that were used in a way that cannot be observed.
        used_without_grad: whether one was used while gradients were off, as in the first pass of a
            reentrant checkpoint.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batch: int,
        receive: Callable[[Arrival], None],
        replaced: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.receive = receive
        self.unrecognized: set[str] = set()
        self.used_without_grad = False
        self._in_backward = False
        self._productions = Productions()
        self._replaced = {id(parameters[name]): by for name, by in (replaced or {}).items()}
        self._pieces: dict[int, tuple[Piece, ...]] = {}
        self._alive: list[Tensor] = []  # an id means nothing once its tensor is gone
        for name, parameter in parameters.items():
            self._remember(parameter, (Piece(name),))
        self._anchor = torch.zeros((), requires_grad=True)

    def backward(self, loss: Tensor) -> None:
        """Run a backward pass in which observers of recomputed calls are in place too.

        `torch.autograd.backward` of a tensor would step out of this mode for its whole duration;
        that of a graph edge does not.
        """
        edge = torch.autograd.graph.get_gradient_edge(loss)
        self._in_backward = True
        try:
            torch.autograd.backward(edge, torch.ones_like(loss))
        finally:
            self._in_backward = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = self._call(func, args, kwargs)
        self._productions.note(func, args, kwargs, output)
        return output

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, behind an observer if the call uses a parameter."""
        found = [value for value in tensors_in(args, kwargs) if id(value) in self._pieces]
        if not found or call_name(func) in INERT_CALLS:
            return func(*args, **kwargs)
        if self._replaced:
            args, kwargs = self._replace(args), self._replace(kwargs)
            found = [value for value in found if id(value) not in self._replaced]
            if not found:
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if self._derive(func, args, output):
            return output
        use = self._recognize(func, args, kwargs)
        roles = {id(role.parameter): role for role in use.roles} if use is not None else {}
        # the same tensor in two places, or in a place that is no role, is more than a role tells
        if use is None or len(found) != len({id(value) for value in found} & set(roles)):
            return self._give_up(found, output)
        return self._observe(use, [roles[id(value)] for value in found], output)

    def _observe(self, use: Use, roles: list[Role], output: Tensor) -> Tensor:
        parameters = [role.parameter for role in roles if role.parameter is not None]
        rows = output.shape[0]
        if rows % self.batch or use.input.shape[0] != rows:
            return self._give_up(parameters, output)
        if not torch.is_grad_enabled():
            self.used_without_grad = True
            return output
        k = rows // self.batch
        saved = []
        if any(role.needs_input for role in roles):
            # under autocast the call computed with a cast of its input
            dtype = output.dtype if use.saves_as_computed else use.input.dtype
            kept, remake = self._productions.keep(use.input, dtype)
            saved.append(kept)

        def receive(grad_output: Tensor, kept: Tensor | None = None) -> None:
            grad_output = grad_output.unflatten(0, (self.batch, k))
            input = None if kept is None else remake(kept).unflatten(0, (self.batch, k))
            for role in roles:
                for piece in self._pieces[id(role.parameter)]:
                    arriving = input if role.needs_input else None
                    self.receive(Arrival(piece, role, grad_output, arriving))

        return _Observer.apply(self._anchor, output, receive, *saved)

    def _recognize(self, func: Any, args: Any, kwargs: Any) -> Use | None:
        if func in _RECOGNIZED:
            return _RECOGNIZED[func](*args, **kwargs)
        if kwargs:
            return None
        if func in _MULTIPLY and len(args) == 2:
            return uses.multiply(args[0], args[1], self._is_parameter)
        if func in _ADD and len(args) == 2:
            return uses.add(args[0], args[1], self._is_parameter)
        if func is torch.addcmul and len(args) == 3:
            return uses.multiply_add(*args)
        return None

    def _derive(self, func: Any, args: tuple[Any, ...], output: Any) -> bool:
        """Remember `output` when it holds a parameter's numbers, row for row."""
        if func is torch.cat:
            return self._derive_cat(args, output)
        source = args[0] if args else None
        if not isinstance(source, Tensor) or id(source) not in self._pieces:
            return False
        if func in _CASTS:
            fits = output.device == source.device and output.is_floating_point()
        elif func in _RESHAPES:
            # a vector with more dimensions of size 1 keeps its rows
            fits = max(source.shape, default=1) == max(output.shape, default=1) == source.numel()
        else:
            fits = False
        if fits and id(output) not in self._pieces:
            self._remember(output, self._pieces[id(source)])
        return fits

    def _derive_cat(self, args: tuple[Any, ...], output: Tensor) -> bool:
        if len(args) != 1 or output.ndim != 1:
            return False
        pieces: list[Piece] = []
        start = 0
        for part in args[0]:
            for piece in self._pieces.get(id(part), ()):
                stop = part.shape[0] if piece.stop is None else piece.stop
                pieces.append(Piece(piece.name, start + piece.start, start + stop))
            start += part.shape[0]
        self._remember(output, tuple(pieces))
        return True

    def _remember(self, tensor: Tensor, pieces: tuple[Piece, ...]) -> None:
        self._alive.append(tensor)
        self._pieces[id(tensor)] = pieces

    def _give_up(self, parameters: list[Tensor], output: Any) -> Any:
        # Under a dispatch mode the formulas of autograd show here too; what the model recomputes
        # was seen in the forward pass.
        if not self._in_backward and any(
            value.is_floating_point() for value in tensors_in((output,), {})
        ):
            for parameter in parameters:
                self.unrecognized.update(piece.name for piece in self._pieces[id(parameter)])
        return output

    def _is_parameter(self, value: Any) -> bool:
        return id(value) in self._pieces

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._replaced.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._replace(inner) for key, inner in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._replace(inner) for inner in value)
        return value


class _Observer(torch.autograd.Function):
    """Identity that hands the gradient passing through it, and what was saved, to `receive`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, receive: Callable[..., None], *saved: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.receive = receive
        ctx.save_for_backward(*saved)
        # An alias that autograd takes for a result of its own: returning `output` would make a view
        # that the model could not modify in place. Nobody else sees `output` itself.
        return output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint unpacks them only once
        if grad_output is not None:
            ctx.receive(grad_output, *saved)
        return (None, grad_output, None, *(None for _ in saved))


def tensors_in(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Tensors among the arguments of a call, also one level inside tuples and lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (inner for inner in value if isinstance(inner, Tensor))


def call_name(func: Any) -> str:
    """What a function seen by a function mode is called; a property's getter by the property."""
    name = getattr(func, "__name__", "")
    # the getter of a property is an anonymous `__get__` of the property's descriptor
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name
