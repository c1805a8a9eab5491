"""Finding, while a model runs, every call in which it uses one of the parameters being measured."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import torch_internals
from . import uses
from .attention import attention
from .call_names import INERT_CALLS, call_name
from .convolution import conv2d
from .derived import Derivations, Meeting, derivation_of, note_made_by
from .embedding import embedding
from .observation import Arrival, Observer
from .remaking import Productions
from .selection import Selections
from .stand_in import quantized_linear
from .uses import Role, Use
from .watched import Piece, Watcher, pieces_of, watched_in

_RECOGNIZED: dict[Any, Callable[..., Use | None]] = {
    F.linear: uses.linear,
    quantized_linear: uses.quantized_linear,
    torch.addmm: uses.addmm,
    F.conv2d: conv2d,
    F.layer_norm: uses.layer_norm,
    torch.layer_norm: uses.layer_norm,
    F.rms_norm: uses.rms_norm,
    torch.rms_norm: uses.rms_norm,
    F.group_norm: uses.group_norm,
    torch.group_norm: uses.group_norm,
    F.batch_norm: uses.batch_norm,
    F.embedding: embedding,
}
_MULTIPLY = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
_ADD = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
# what gives the same numbers in another dtype or, for a vector, with more dimensions of size 1
_CASTS = frozenset(
    {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type_as, Tensor.type}
)
_KEEPING = _CASTS | {Tensor.reshape, Tensor.view, Tensor.unsqueeze, torch.reshape}


class _Watch(NamedTuple):
    """What `Interception.watching` was told, for as long as it watches."""

    samples: int
    receive: Callable[[Arrival], None]
    on_use: Callable[[Tensor], None] | None
    derived: Collection[str]
    selections: Selections | None
    replaced: Mapping[int, Tensor]  # id of a parameter -> what to compute with


class Interception:
    """Puts an observer behind every recognized use of `parameters` while it watches them.

    A watched parameter is of a class whose `__torch_function__` is asked by every call that is
    given the parameter, wherever the model has it from. A call without one runs as ever, and so
    does the backward pass; the uses that a checkpoint makes again in it are observed again.

    A watched parameter asks for a gradient as well, except in the calls that are seen: what reaches
    it comes from a use out of sight (TorchScript, C++, a function with a backward of its own).

    Attributes:
        unrecognized: names of parameters that were used in a way that cannot be observed.
        used_without_grad: whether one was used where the graph of the loss does not lead to: while
            gradients were off, as in the first pass of a reentrant checkpoint, or in a graph that a
            function keeps for a backward pass of its own.
        followed: names of those of which something was made that is followed in their place, with
            the names of all of which the same was made.

    Args:
        parameters: that may be watched, by name.
        constants: tensors of the model that are the same for all samples, such as its buffers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], constants: Iterable[Tensor] = ()) -> None:
        self.unrecognized: set[str] = set()
        self.used_without_grad = False
        self.followed: defaultdict[str, set[str]] = defaultdict(set)
        self._task: int | None = None  # of autograd's engine, while `backward` runs
        self._parameters = parameters
        self._watch: _Watch | None = None
        self._watcher = Watcher(self.call)
        self._derivations = Derivations(parameters, constants, self._watcher.watch)
        self._productions = Productions()
        self._anchor = torch.zeros((), requires_grad=True)

    @contextlib.contextmanager
    def watching(
        self,
        names: Iterable[str],
        samples: int,
        receive: Callable[[Arrival], None],
        *,
        derived: Collection[str] | None = None,
        replaced: Mapping[str, Tensor] | None = None,
        on_use: Callable[[Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Watch some of the parameters in a `with` block, which runs forward *and* backward.

        Args:
            names: of the parameters to watch, which are frozen.
            samples: of the batch that runs.
            receive: takes what each use brings in the backward pass.
            derived: names of those to follow through what the model makes of them alone; None: all.
            replaced: what to compute with in place of some parameters, by name.
            on_use: is told of each parameter that is used, in whatever way. Such uses are found as
                well that can be observed in this batch and not in every one.
        """
        replaced = replaced or {}
        watched = {name: self._parameters[name] for name in (*names, *replaced)}
        selections = None if on_use is None else Selections(samples)
        with (
            self._watcher.watching(watched, self._note_out_of_sight),
            self._productions.noting(find=on_use is not None),
            selections or contextlib.nullcontext(),
        ):
            self._watch = _Watch(
                samples,
                receive,
                on_use,
                self._parameters.keys() if derived is None else derived,
                selections,
                {id(watched[name]): by for name, by in replaced.items()},
            )
            try:
                yield
            finally:
                self._watch = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call that was given a watched tensor, observed if need be."""
        recognize, watch = _RECOGNIZED.get(func), self._watch
        if watch is None or (recognize is None and call_name(func) in INERT_CALLS):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return attention(args, kwargs)
        found = watched_in(args, kwargs)
        if watch.on_use is not None:
            for value in found:
                watch.on_use(value)
        if watch.replaced:
            args, kwargs = _replaced(args, watch.replaced), _replaced(kwargs, watch.replaced)
            found = [value for value in found if id(value) not in watch.replaced]
        if not found:
            return func(*args, **kwargs)
        # as in `torch.vmap`: what rows are is lost; where they are chosen: it is another each time
        is_lost = torch_internals.is_functorch_active()
        if is_lost or (watch.selections and watch.selections.hold_any((*args, *kwargs.values()))):
            return self._give_up(found, _run_frozen(func, args, kwargs, found))
        if recognize is None:
            output = self._same_numbers(func, args, kwargs)
            if output is not None:
                return output
        use = None if recognize else self._recognize(func, args, kwargs)
        if all(name in watch.derived for name in _names_of(found)):
            in_every_batch = watch.on_use is not None
            if self._derivations.are_alone(
                func, args, kwargs, found, watch.samples, in_every_batch=in_every_batch
            ):
                made = self._derivations.run(func, args, kwargs)
                if made is not NotImplemented:
                    names = set(_names_of(found))
                    for name in names:
                        self.followed[name] |= names
                    return made
            elif recognize is None and use is None:
                met = self._derivations.meetings(func, args, kwargs, watch.samples)
                if met is not None:
                    return self._meet(func, args, kwargs, met, watch)
        output = _run_frozen(func, args, kwargs, found)
        if recognize:
            use = recognize(*args, **kwargs)
        if use is None:
            return self._give_up(found, output)
        if derivation_of(use.input):  # it stands for the samples here, as an embedding does
            self._give_up([use.input], output)
            found = [value for value in found if value is not use.input]
        ids = {id(value) for value in found}
        roles = [role for role in use.roles if id(role.parameter) in ids]
        # the same tensor in two places, or in a place that is no role, is more than a role tells
        if len(found) != len(ids) or len(found) != len(roles):
            return self._give_up(found, output)
        rows = output.shape[0]
        if rows % watch.samples or use.input.shape[0] != rows:
            return self._give_up(found, output)
        if not torch.is_grad_enabled():
            self.used_without_grad = True
            return output
        observed = self._observe(use, roles, output, watch)
        if recognize is not None:
            self._productions.note(func, args, kwargs, observed)
        return observed

    def backward(self, loss: Tensor) -> None:
        """Run a backward pass, and note what arrives by another one within it."""

        def begin(_: Tensor) -> None:
            self._task = torch_internals.current_graph_task()

        loss.register_hook(begin)
        try:
            loss.backward()
        finally:
            self._task = None

    def _note_arrival(self) -> None:
        if self._task not in (None, torch_internals.current_graph_task()):
            self.used_without_grad = True

    def _note_out_of_sight(self, name: str) -> None:
        self._note_arrival()
        self.unrecognized.add(name)

    def _observe(self, use: Use, roles: list[Role], output: Tensor, watch: _Watch) -> Tensor:
        samples = watch.samples

        def receive(arrival: Arrival) -> None:
            self._note_arrival()
            watch.receive(arrival)

        parts: list[tuple[Piece, Role]] = []
        for role in roles:
            derivation = derivation_of(role.parameter)
            if derivation is None:
                parts += [(piece, role) for piece in pieces_of(role.parameter)]
            else:
                parts += derivation.parts(role, output.shape[0] // samples)
        if not any(role.needs_input for role in roles):
            return Observer.apply(
                self._anchor,
                output,
                lambda grad_output: receive(Arrival(parts, samples, grad_output, ())),
            )
        # under autocast the call computed with a cast of its input
        dtype = output.dtype if use.saves_as_computed else use.input.dtype
        kept, remake = self._productions.keep(use.input, dtype)
        statistics = _statistics(output) if use.has_statistics else ()

        def arrive(grad_output: Tensor, kept: Tensor, *statistics: Tensor) -> None:
            receive(Arrival(parts, samples, grad_output, (remake(kept), *statistics)))

        return Observer.apply(self._anchor, output, arrive, kept, *statistics)

    def _meet(
        self, func: Any, args: Any, kwargs: Any, meetings: list[Meeting], watch: _Watch
    ) -> Any:
        """The result of a call in which what was made of parameters alone meets the samples."""
        if not torch.is_grad_enabled():
            self.used_without_grad = True
            return func(*args, **kwargs)
        observed: dict[int, Tensor] = {}
        for met in meetings:

            def arrive(grad: Tensor, met: Meeting = met) -> None:
                self._note_arrival()
                watch.receive(Arrival(met.parts(), met.samples, met.by_sample(grad), ()))

            observed[id(met.value)] = Observer.apply(self._anchor, met.expanded, arrive)
        return func(*_replaced(args, observed), **_replaced(kwargs, observed))

    def _recognize(self, func: Any, args: Any, kwargs: Any) -> Use | None:
        if kwargs:
            return None
        if func in _MULTIPLY and len(args) == 2:
            return uses.multiply(args[0], args[1], pieces_of)
        if func in _ADD and len(args) == 2:
            return uses.add(args[0], args[1], pieces_of)
        if func is torch.addcmul and len(args) == 3:
            return uses.multiply_add(*args)
        return None

    def _same_numbers(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """The result, watched too, of a call that keeps a parameter's numbers, row for row."""
        source: Any = args[0] if args else None
        joins = func is torch.cat
        if not joins and (func not in _KEEPING or not isinstance(source, Tensor)):
            return None
        parts = source if joins else (source,)
        if any(derivation_of(part) for part in parts):
            return None
        output: Tensor = _run_frozen(func, args, kwargs, [p for p in parts if pieces_of(p)])
        if not joins and output is not source and not pieces_of(output):
            output = output.detach()  # a leaf, also where it is a view of what asks for a gradient
        if joins:
            pieces = _joined(args, output)
        elif func in _CASTS:
            is_one = output.device == source.device and output.is_floating_point()
            pieces = pieces_of(source) if is_one else ()
        else:
            # a vector with more dimensions of size 1 keeps its rows
            is_one = max(source.shape, default=1) == max(output.shape, default=1) == source.numel()
            pieces = pieces_of(source) if is_one else ()
        if not pieces:
            return None
        if not pieces_of(output):
            self._watcher.watch(output, pieces)
            note_made_by(output, func, args, kwargs)
        return output

    def _give_up(self, parameters: list[Tensor], output: Any) -> Any:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        if any(isinstance(o, Tensor) and _has_gradients(o) for o in outputs):
            if not torch.is_grad_enabled():  # none flows through this call
                # of a backward pass it is no use, but a part of the gradient of one
                self.used_without_grad |= torch_internals.current_node() is None
                return output
            for parameter in parameters:
                self.unrecognized.update(piece.name for piece in pieces_of(parameter))
        return output


def _names_of(found: list[Tensor]) -> Iterator[str]:
    return (piece.name for value in found for piece in pieces_of(value))


def _has_gradients(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _replaced(value: Any, by: Mapping[int, Tensor]) -> Any:
    """An argument, or all of them, with other tensors in place of some, told by their ids."""
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if isinstance(value, dict):
        return {key: _replaced(inner, by) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replaced(inner, by) for inner in value)
    return value


def _run_frozen(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    asking = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor in asking:
        tensor.requires_grad = False
    try:
        return func(*args, **kwargs)
    finally:
        for tensor in asking:
            tensor.requires_grad = True


def _joined(args: tuple[Any, ...], output: Tensor) -> tuple[Piece, ...]:
    """The pieces of several vectors, one after the other."""
    if len(args) != 1 or output.ndim != 1:
        return ()
    pieces: list[Piece] = []
    start = 0
    for part in args[0]:
        for piece in pieces_of(part):
            stop = part.shape[0] if piece.stop is None else piece.stop
            pieces.append(Piece(piece.name, start + piece.start, start + stop))
        start += part.shape[0]
    return tuple(pieces)


def _statistics(output: Tensor) -> tuple[Tensor, ...]:
    """Mean and rstd that the backward pass of a LayerNorm keeps, if they are fp32 and at hand."""
    node: Any = output.grad_fn
    if node is None or node.name() != "NativeLayerNormBackward0":
        return ()
    # to read what a hook has packed is to unpack it: a checkpoint would run again in mid-forward
    if torch_internals.hooks_in_use() is not None:
        return ()
    mean, rstd = node._saved_result1, node._saved_result2
    return (mean, rstd) if mean.dtype == torch.float32 else ()
