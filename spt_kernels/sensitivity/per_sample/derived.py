"""Tensors that a model makes of its parameters alone, and what their gradients mean for those.

A table of position biases, the small network that makes one, a standardized weight: all samples of
a batch share it, and autograd sums over them. Each sample's gradient of what was made is had where
it meets the samples; from there a small graph leads back to the parameters, for all of them at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .uses import Factors, Kind, Role, Rule, whole
from .watched import Piece, pieces_of

_DERIVATION = "_spt_derivation"  # attributes of a watched tensor
_MADE_BY = "_spt_made_by"

# calls whose arguments are broadcast against each other along the batch
_ELEMENTWISE = frozenset(
    {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
    | {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__}
    | {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}
    | {torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, torch.where}
)

# calls that look rows up by ids
_LOOKUPS = frozenset(
    {Tensor.__getitem__, torch.index_select, Tensor.index_select}
    | {torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim}
)


class Derivation:
    """One tensor made of parameters alone.

    Args:
        made: the tensor, with the graph that leads to the leaves.
        leaves: the parameters' values by name.
    """

    def __init__(self, made: Tensor, leaves: Mapping[str, Tensor]) -> None:
        self.made = made
        self.leaves = dict(leaves)

    def parts(self, role: Role, rows_per_sample: int) -> list[tuple[Piece, Role]]:
        """The parameters in a use in which what was made of them has `role`, each with its own."""
        waiting: dict[str, Tensor] = {}  # of the samples that were asked for last
        last: list[Tensor] = []

        def rule_of(name: str) -> Rule:
            def rule(samples: int, grad_output: Tensor, *saved: Tensor) -> Factors:
                if name not in waiting or last[0] is not grad_output:
                    factors = role.rule(samples, grad_output, *saved)
                    waiting.update(self._gradients(role.kind, factors))
                    last[:] = [grad_output]
                gradient = waiting.pop(name)
                if not waiting:
                    last.clear()
                return Factors(gradient)

            return rule

        numel = self.made.numel() + sum(leaf.numel() for leaf in self.leaves.values())
        samples_numel = max(role.samples_numel, -(-numel // rows_per_sample))
        return [
            (
                Piece(name),
                Role(role.parameter, "whole", rule_of(name), role.needs_input, samples_numel, True),
            )
            for name in self.leaves
        ]

    def _gradients(self, kind: Kind, factors: Factors) -> dict[str, Tensor]:
        """Each sample's gradient of every leaf, `[samples, *shape]`."""
        of_made = whole(kind, factors).reshape(-1, *self.made.shape).to(self.made.dtype)
        found = torch.autograd.grad(
            self.made,
            list(self.leaves.values()),
            of_made,
            retain_graph=True,
            is_grads_batched=True,
        )
        return dict(zip(self.leaves, found, strict=True))


def derivation_of(value: Any) -> Derivation | None:
    """How a watched tensor was made of parameters; None where it holds their own numbers."""
    found: Derivation | None = getattr(value, _DERIVATION, None)
    return found


def note_made_by(output: Tensor, func: Any, args: Any, kwargs: Any) -> None:
    """Remember of a tensor that holds a parameter's numbers which call made it of that."""
    output.__dict__[_MADE_BY] = (func, args, kwargs)


class Meeting(NamedTuple):
    """A tensor made of parameters where it meets the samples, one copy for each row, in no memory.

    Attributes:
        value: the tensor as the model has it.
        derivation: of it.
        expanded: `[rows, ...]`.
        samples: of the batch.
    """

    value: Tensor
    derivation: Derivation
    expanded: Tensor
    samples: int

    def by_sample(self, grad: Tensor) -> Tensor:
        """A gradient of `expanded` as one of what was made for each sample, `[samples, *shape]`."""
        if self.samples == 1 and grad.shape == self.value.shape:
            return grad[None]
        of_samples = grad.unflatten(0, (self.samples, -1)).sum(1)
        return of_samples.reshape(self.samples, *self.derivation.made.shape)

    def parts(self) -> list[tuple[Piece, Role]]:
        """The parameters, each with its role."""
        whole = Role(self.value, "whole", lambda samples, grad: Factors(grad), needs_input=False)
        return self.derivation.parts(whole, 1)


class Derivations:
    """Follows what a model makes of watched parameters alone.

    Args:
        parameters: that may be watched, by name.
        constants: tensors of the model that are the same for all samples, such as its buffers.
        watch: gives a tensor the pieces that it holds.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor],
        watch: Callable[[Tensor, tuple[Piece, ...]], None],
    ) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._storages = {_storage(tensor) for tensor in constants}
        self._watch = watch
        self._leaves: dict[str, Tensor] = {}

    def are_alone(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        found: list[Tensor],
        samples: int,
        *,
        in_every_batch: bool,
    ) -> bool:
        """Whether no argument of a call has anything to do with a sample.

        Ids of each sample have, if that is to be so `in_every_batch`; some may be equal by chance.
        """
        watched = {id(value) for value in found}

        def is_alone(tensor: Tensor) -> bool:
            if id(tensor) in watched:
                return True
            if func in _LOOKUPS and not tensor.is_floating_point():
                if in_every_batch and tensor.shape[:1] == (samples,) and tensor.stride(0):
                    return _storage(tensor) in self._storages
                if func is Tensor.__getitem__:
                    return True
            return self._is_constant(tensor, samples)

        return all(is_alone(tensor) for tensor in _tensors_in(args, kwargs))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call whose arguments are watched tensors and constants, watched too."""
        name = getattr(func, "__name__", "")
        if not torch.is_grad_enabled() or (name.endswith("_") and not name.endswith("__")):
            return NotImplemented
        sources: dict[str, Tensor] = {}

        def shadow(value: Any) -> Any:
            made = self._shadow(value, sources)
            return value if made is None else made

        shadows = _mapped(args, shadow), _mapped(kwargs, shadow)
        # under a checkpoint's hooks the small graph would ask for the whole block again
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            made = func(*shadows[0], **shadows[1])
        if isinstance(made, (tuple, list)):
            return type(made)(self._handed(each, sources) for each in made)
        return self._handed(made, sources)

    def meetings(self, func: Any, args: Any, kwargs: Any, samples: int) -> list[Meeting] | None:
        """Where a call brings what was made of parameters to the samples; None: not row by row."""
        tensors = _tensors_in(args, kwargs)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if func is F.scaled_dot_product_attention and samples > 1:
            shape = (*tensors[0].shape[:-1], tensors[1].shape[-2])
            met = [value for value in (*args[3:4], kwargs.get("attn_mask")) if pieces_of(value)]
        elif func in _ELEMENTWISE or samples == 1:
            shape = torch.broadcast_shapes(*shapes) if func in _ELEMENTWISE else ()
            met = [value for value in tensors if pieces_of(value)]
        else:
            return None
        if len(met) != sum(bool(pieces_of(tensor)) for tensor in tensors):
            return None
        found = [self._meeting(value, shape, samples) for value in met]
        return None if None in found else [each for each in found if each is not None]

    def _meeting(self, value: Tensor, shape: tuple[int, ...], samples: int) -> Meeting | None:
        sources: dict[str, Tensor] = {}
        made = self._shadow(value, sources)
        if made is None:
            return None
        derivation = derivation_of(value) or Derivation(made, sources)
        if samples == 1:
            return Meeting(value, derivation, made.detach(), 1)
        aligned = (*(1,) * (len(shape) - made.ndim), *made.shape)
        if shape and aligned[0] == shape[0] > 1 and bool((made == made[:1]).all()):
            # the model has copied it for each row: one of the copies stands for all
            with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                made = made[:1]
            derivation, aligned = Derivation(made, sources), (1, *aligned[1:])
        if not shape or len(aligned) != len(shape) or aligned[0] != 1 or shape[0] % samples:
            return None
        expanded = made.detach().reshape(aligned).expand(shape[0], *aligned[1:])
        return Meeting(value, derivation, expanded, samples)

    def _is_constant(self, tensor: Tensor, samples: int) -> bool:
        if tensor.requires_grad:
            return False  # of a batch of one a sample's own number has the shape of a constant
        if tensor.numel() == 1 or (tensor.shape[0] == 1 and samples > 1):
            return True
        if tensor.ndim == 1:
            return True  # of channels, such as a gain that is not measured
        # a copy for each sample in no memory is as good as a sample's
        is_copied = tensor.shape[0] > 1 and tensor.stride(0) == 0
        return not is_copied and _storage(tensor) in self._storages

    def _shadow(self, value: Any, sources: dict[str, Tensor]) -> Tensor | None:
        """A watched tensor with the graph that leads to its parameters, which `sources` gets."""
        if not isinstance(value, Tensor) or not pieces_of(value):
            return None
        derivation = derivation_of(value)
        if derivation is not None:
            sources |= derivation.leaves
            return derivation.made
        name = self._names.get(id(value))
        if name is not None:
            leaf = self._leaves.get(name)
            if leaf is None:
                leaf = self._leaves[name] = value.detach().requires_grad_(True)
            sources[name] = leaf
            return leaf
        func, args, kwargs = value.__dict__[_MADE_BY]

        def shadow(inner: Any) -> Any:
            made = self._shadow(inner, sources)
            return inner if made is None else made

        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            made = func(*_mapped(args, shadow), **_mapped(kwargs, shadow))
        assert isinstance(made, Tensor)
        return made

    def _handed(self, made: Any, sources: Mapping[str, Tensor]) -> Any:
        """What the model gets: without a graph, and watched."""
        if not isinstance(made, Tensor) or not made.requires_grad:
            return made
        handed = made.detach()
        self._watch(handed, tuple(Piece(name) for name in sources))
        handed.__dict__[_DERIVATION] = Derivation(made, sources)
        return handed


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors_in(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors among the arguments of a call, also one level inside tuples and lists."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        inner = value if isinstance(value, (tuple, list)) else (value,)
        found += [each for each in inner if isinstance(each, Tensor)]
    return found


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(inner, change) for inner in value)
    return change(value)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
