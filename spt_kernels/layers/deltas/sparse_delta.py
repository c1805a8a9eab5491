"""`SparseDelta`: a few trained values inside a frozen tensor, which is kept up to date with them.

The tensor that a forward reads holds base + delta at all times, whoever changes the delta:
`SparseAdamW` writes the weights itself, any other torch optimizer is followed by a step hook, and
an eager forward compares the delta's version with the one that was written last.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...distributed.sharded import is_sharded
from ...ops.write_delta import write_delta
from .late_optimizer import check_made_after, check_not_cast
from .name_in_model import told_as
from .never_called import check_called
from .sharded_delta import local_deltas
from .written_state import WrittenState

_TAG = "_spt_owner"
_LEFT = "_spt_left_to_hook"


class Owner(nn.Module):
    """A module that holds trained parameters of its own.

    Attributes:
        spt_trains_where_read: whether reads of its parameters train, and not calls of it alone.
    """

    spt_trains_where_read: ClassVar[bool] = False

    @property
    def spt_was_called(self) -> bool:
        """Whether its forward has ever run eagerly."""
        return bool(self.__dict__.get("_spt_called", False))

    def sparse_deltas(self) -> dict[str, SparseDelta]:
        """Local parameter name -> its sparse delta."""
        raise NotImplementedError


class DeltaOwner(Protocol):
    """An owner some of whose parameters have a sparse delta."""

    def delta_local_names(self, local: str) -> tuple[str, str, str]:
        """Names of the delta, index and original of a parameter."""
        ...


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """The trained entries of one frozen tensor.

    Of a quantized matrix nothing is written into: the delta is `beside` it, an ordinary parameter
    that the layer adds the product with. All else is told of the others here.

    `target` follows `delta` by itself when a `torch.optim.Optimizer` steps, and by the next eager
    forward when the delta is changed in place or gets new `.data`. What writes into `delta.data`
    leaves no trace: it is found by the first eager forward after `eval()`, or after a `train()`
    that switches, about which averages are copied to a model. Elsewhere, as after an optimizer that
    is no `torch.optim.Optimizer`, and where forwards are compiled, which do not look, call `write`,
    or `write_deltas` on the values of `sparse_deltas(model)`; so for what FSDP has sharded.

    Attributes:
        target: the tensor, frozen; holds base + delta at `index` and base values elsewhere.
        delta: fp32 `[nnz]`, trained.
        index: int32 `[nnz]`, sorted flat positions in `target`.
        original: `[nnz]` in the target's dtype: its base values at `index`.
        written: which state of `delta` was written last.
        whole: whether `delta` are the values themselves, all of them, of the shape of `target`,
            which is of 16 bits and too coarse to be trained: then `original` is zero.
        beside: whether `target` is quantized and holds its base values alone: then `original` is
            empty.
    """

    target: Tensor
    delta: nn.Parameter
    index: Tensor
    original: Tensor
    written: WrittenState = field(default_factory=WrittenState)
    whole: bool = False
    beside: bool = False

    def __repr__(self) -> str:
        return (
            f"SparseDelta(nnz={self.index.numel()}, target={list(self.target.shape)} "
            f"{self.target.dtype} on {self.target.device})"
        )

    @property
    def is_fresh(self) -> bool:
        """Whether `target` holds what it should of the delta, as far as versions can tell."""
        return self.beside or self.written.matches(self.delta)

    @property
    def is_away(self) -> bool:
        """Whether `target` is offloaded, so that base + delta is written when it is fetched."""
        return self.written.is_away

    def write(self) -> None:
        """Write base + delta into `target`, unless that is offloaded."""
        write_deltas([self])

    def restore(self) -> None:
        """Write the base values into `target`, bit for bit, until the next forward.

        What is trained whole keeps none, and is left as it is.
        """
        restore_deltas([self])

    def base(self) -> Tensor:
        """A copy of `target` with its base values; of one that keeps none, as it is."""
        copy = self.target.detach().clone()
        if not (self.whole or self.beside):
            copy.view(-1).index_copy_(0, self.index.long(), self.original)
        return copy

    def mark_written(self) -> None:
        """Declare, as an optimizer that has just written `target` itself, that it is up to date."""
        self.written.record(self.delta, by_optimizer=True)


def write_deltas(deltas: Iterable[SparseDelta]) -> None:
    """Write base + delta into every target, one launch per device.

    Where FSDP has sharded them, every process of the mesh must call this with the same deltas. What
    is offloaded is written when it is fetched.
    """
    written = [d for d in deltas if not d.beside]
    chosen = [d for d in written if not d.is_away]
    if len(chosen) < len(written):  # a graph that has saved these weights is told as by a write
        torch.autograd.graph.increment_version([d.target for d in written if d.is_away])
    _write(chosen, restore=False)
    for d in chosen:
        d.written.record(d.delta)


def restore_deltas(deltas: Iterable[SparseDelta]) -> None:
    """Write the base values into every target that has them, one launch per device."""
    chosen = [d for d in deltas if not (d.whole or d.beside)]
    if any(d.is_away for d in chosen):
        raise RuntimeError("weights are offloaded: spt.offload(model, 'nothing') brings them back")
    _write(chosen, restore=True)
    for d in chosen:
        d.written.forget()


@torch.no_grad()
def hold_values(deltas: Iterable[SparseDelta], values: Iterable[Tensor]) -> None:
    """Write what targets once held into them, to the bit, as what they hold of their deltas.

    Args:
        deltas: none of them beside its target.
        values: for each its `[nnz]` values, in the dtype and on the device of its target.
    """
    pairs = list(zip(deltas, values, strict=True))
    _write([replace(d, original=held) for d, held in pairs], restore=True)
    for d, _ in pairs:
        d.written.record(d.delta)


@torch.no_grad()
def write_untold(deltas: Iterable[SparseDelta]) -> None:
    """Write base + delta into targets, which no version of theirs tells of."""
    _write([replace(d, target=d.target.data) for d in deltas], restore=False)


@torch.no_grad()
def write_into(delta: SparseDelta, copy: Tensor) -> None:
    """Write base + delta into a copy of the target, elsewhere or rounded to a narrower dtype."""
    index, original, values = (
        t.detach().to(copy.device) for t in (delta.index, delta.original, delta.delta)
    )
    if copy.dtype == original.dtype:
        held = nn.Parameter(values, requires_grad=False)
        _write(
            [SparseDelta(target=copy, delta=held, index=index, original=original)], restore=False
        )
    else:
        copy.view(-1).index_copy_(0, index.long(), (original + values).to(copy.dtype))  # [nnz]


@torch.no_grad()
def _write(deltas: list[SparseDelta], *, restore: bool) -> None:
    for d in deltas:
        if d.written.shape is not None and d.target.shape != d.written.shape:
            raise RuntimeError(
                f"{_target_name(d.delta)} is tuned at positions of {list(d.written.shape)}, and is "
                f"{list(d.target.shape)} now: put back what was there"
            )
    if any(is_sharded(d.target) for d in deltas):
        deltas = local_deltas(deltas, with_values=not restore)
    ours = [d for d in deltas if d.target.dtype != torch.float64]
    if ours:
        write_delta(
            [d.target for d in ours],
            [d.index for d in ours],
            [d.original for d in ours],
            None if restore else [d.delta.view(-1) if d.whole else d.delta for d in ours],
        )
    # The op serves the dtypes that are trained in; float64 models exist to check gradients with
    for d in deltas:
        if d.target.dtype == torch.float64:
            d.target.view(-1)[d.index.long()] = d.original if restore else d.original + d.delta


class DeltaSlot:
    """The place of a delta in its module, to find without a search what is there later on."""

    __slots__ = ("_delta", "_names", "_owner")

    def __init__(self, delta: Tensor, owner: DeltaOwner, local: str) -> None:
        self._delta = delta
        self._owner = weakref.ref(owner)
        self._names = (local, *owner.delta_local_names(local))

    def tensors(self) -> tuple[Any, ...]:
        """Target, index and original as the module has them now; empty if the delta is gone."""
        owner = self._owner()
        if owner is None:
            return ()
        target, delta, index, original = self._names
        constants = owner.__dict__
        parameters = constants["_parameters"]
        if parameters.get(delta) is not self._delta:
            return ()
        return parameters.get(target), constants.get(index), constants.get(original)


def slot_of(delta: SparseDelta) -> DeltaSlot | None:
    """Where a delta lives; None if no module has it."""
    owner = owner_of(delta.delta)
    if owner is None:
        return None
    for local, found in owner.sparse_deltas().items():
        if found.delta is delta.delta:
            return DeltaSlot(delta.delta, cast(DeltaOwner, owner), local)
    return None


def delta_of(parameter: Tensor) -> SparseDelta | None:
    """The sparse delta that a parameter is the trained part of, to be written after each step.

    None for any other tensor, and for a delta beside a quantized matrix.
    """
    owner = owner_of(parameter)
    if owner is None:
        return None
    found = next((d for d in owner.sparse_deltas().values() if d.delta is parameter), None)
    return None if found is None or found.beside else found


def owner_of(parameter: Tensor) -> Owner | None:
    """The tuned module that a trained parameter was tagged with, while that is alive."""
    tag = getattr(parameter, _TAG, None)
    owner: Any = tag.owner() if isinstance(tag, _OwnerTag) else None
    return owner if isinstance(owner, Owner) else None  # it may be plain again


def check_trained_whole(*parameters: tuple[bool, Tensor | None]) -> None:
    """Refuse to train all of a parameter that has a sparse delta: the next write would undo it.

    Args:
        parameters: of each, whether it requires a gradient itself, and its delta if it has one.

    Raises:
        RuntimeError: one does and has.
    """
    for is_trained, delta in parameters:
        if is_trained and delta is not None:
            raise RuntimeError(
                f"{_target_name(delta)} has a sparse delta and requires a gradient itself: the "
                "next write of base + delta would undo what it was trained to there; "
                "requires_grad_(False) on it, or leave it out of the plan"
            )


def _target_name(delta: Tensor) -> str:
    """The name of the parameter that a delta belongs to, as far as it is known."""
    owner = owner_of(delta)
    if owner is None:
        return "a parameter"
    local = next((n for n, d in owner.sparse_deltas().items() if d.delta is delta), "parameter")
    return f"{told_as(owner)}.{local}"


def tag(parameter: Tensor, owner: Owner, *, anew: bool = False) -> None:
    """Let `owner_of` find the module from its parameter; `anew` if it has another's already."""
    current = None if anew else owner_of(parameter)
    if current is None or all(p is not parameter for p in current._parameters.values()):
        setattr(parameter, _TAG, _OwnerTag(owner))  # a shallow copy must not take it away
    _follow_optimizers()


def untag(parameter: Tensor) -> None:
    """Let `owner_of` find nothing."""
    vars(parameter).pop(_TAG, None)


class _OwnerTag:
    """A weak reference that travels with a Parameter and lets it be pickled."""

    __slots__ = ("owner",)

    def __init__(self, owner: Owner) -> None:
        self.owner = weakref.ref(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickled it is an empty set, which even `torch.load(weights_only=True)` accepts and
        # `owner_of` ignores; the module tags its parameters anew when it is unpickled itself.
        return set, ()


@functools.cache
def _follow_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def leave_to_hook(optimizer: Optimizer, parameters: list[Tensor] | None) -> None:
    """Let the hook after this step look at these parameters alone; None for all of them."""
    optimizer.__dict__[_LEFT] = parameters


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Write what the optimizer has changed, through `.data` or otherwise."""
    left = optimizer.__dict__.pop(_LEFT, None)
    if left is not None and not left:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stale = []
    for parameter in parameters if left is None else left:
        delta = delta_of(parameter)
        if delta is None:
            _check_is_where_it_was(parameter)
            continue
        if delta.written.by_optimizer:
            delta.written.by_optimizer = False
        else:
            stale.append(delta)
    write_deltas(stale)
    _check_reached(parameters)
    if all(owner_of(p) is None for p in parameters if p.requires_grad):
        check_made_after(parameters)


def _check_is_where_it_was(parameter: Tensor) -> None:
    """Refuse a step on what is not, as FSDP has put something else into the parameter's module."""
    owner = owner_of(parameter)
    if owner is None or any(own is parameter for own in owner._parameters.values()):
        return
    if is_sharded(parameter):
        raise RuntimeError(
            f"{told_as(owner)} has its parameters gathered, as FSDP leaves them after a forward "
            "without a backward, so that its deltas cannot be written: call reshard() on the "
            "modules of fully_shard before the step"
        )
    if any(own is not None and is_sharded(own) for own in owner._parameters.values()):
        raise RuntimeError(
            f"the optimizer was made before fully_shard, and holds nothing that {told_as(owner)} "
            "trains now: make it after, as spt.SparseAdamW(spt.param_groups(model))"
        )


def _check_reached(parameters: list[Tensor]) -> None:
    """Refuse to train on when the model reads what a tuned layer has, and never calls the layer."""
    if all(p.grad is None for p in parameters):
        return  # a step without a backward before it tells nothing
    without = []
    for parameter in parameters:
        if parameter.grad is not None:
            continue
        if not parameter.requires_grad:
            check_not_cast(parameter)
            continue
        owner = owner_of(parameter)
        if owner is not None and not owner.spt_was_called:
            without.append(owner)
    if without:
        check_called(without, filter(None, map(owner_of, parameters)))
