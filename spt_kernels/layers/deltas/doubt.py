"""`Doubt`: how a module's forwards find deltas that were changed without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ...ops.dtypes import FLOATS_OF_16_BITS
from .held_values import can_be_looked_at, holds
from .name_in_model import told_as
from .sparse_delta import SparseDelta, write_untold

# A loop that writes through `.data` does so in every step: few forwards tell, and a card, which a
# look waits for, is left alone by all others. One forward may call a layer some times.
WATCHED = 4
_NAME = "_spt_doubted"


class Doubt(NamedTuple):
    """What the next forward of a module does.

    Attributes:
        is_followed: whether it writes what was changed without a trace, and looks no further.
        left: of how many forwards after that such a change is refused, if they train, or followed.
        targets: parameter -> the id of what the module has there itself; a forward that is given
            others, by `torch.func.functional_call`, leaves all as it is.
    """

    is_followed: bool
    left: int
    targets: Mapping[str, int]


def doubt(holder: Any, left: int | None = None) -> None:
    """Have the next forward write what was changed without a trace until then.

    Args:
        holder: a `DeltaHolder`.
        left: see `Doubt`; None leaves it as it is.
    """
    before: Doubt | None = holder.__dict__.get(_NAME)
    left = (0 if before is None else before.left) if left is None else left
    targets = {local: id(holder._parameters[local]) for local in holder._spt_states}
    holder.__dict__[_NAME] = Doubt(True, left, targets)


def doubt_again(holder: Any) -> None:
    """`doubt`, of a module whose parameters may be others now, if it has a doubt."""
    if _NAME in holder.__dict__:
        doubt(holder)


def settle(holder: Any) -> None:
    """Follow, or refuse, what was changed without a trace.

    Raises:
        RuntimeError: it was changed between two forwards that train.
    """
    now: Doubt | None = holder.__dict__.get(_NAME)
    deltas = holder.sparse_deltas()
    if now is None or any(
        id(holder._parameters.get(local)) != own for local, own in now.targets.items()
    ):
        return  # another thread is through; or the tensors are those of this call alone
    left = now.left
    if now.is_followed:
        _hold_again(deltas.values())
    else:
        looked_at = {n: d for n, d in deltas.items() if can_be_looked_at(d) and d.is_fresh}
        changed = {local: delta for local, delta in looked_at.items() if not holds(delta)}
        if changed and torch.is_grad_enabled():
            raise RuntimeError(_told(holder, next(iter(changed))))
        if changed:  # as a teacher is, in every step
            write_untold(changed.values())
            left = WATCHED
        elif all(map(_is_new, deltas.values())):
            left -= 1
    if left:
        holder.__dict__[_NAME] = now._replace(is_followed=False, left=left)
    else:
        holder.__dict__.pop(_NAME, None)


def settle_for_good(holder: Any) -> None:
    """Write what was changed without a trace, and let no forward look for that."""
    _hold_again(holder.sparse_deltas().values())
    holder.__dict__.pop(_NAME, None)


def _hold_again(deltas: Iterable[SparseDelta]) -> None:
    """Have targets hold their deltas; what is there already stays, to the bit."""
    # of 16 bits base + delta may be there as stochastic rounding, which draws anew, has left it
    write_untold(
        d
        for d in deltas
        if can_be_looked_at(d) and d.is_fresh
        if d.target.dtype not in FLOATS_OF_16_BITS or not holds(d)
    )


def _is_new(delta: SparseDelta) -> bool:
    """Whether no gradient is being accumulated, so that a step may lie before this forward."""
    return delta.delta.grad is None


def _told(holder: Any, local: str) -> str:
    return (
        f"{told_as(holder)}.{local} no longer holds what is trained of it: that was changed "
        "through `.data` since the forward before, which leaves no trace, or the parameter itself "
        "was written into. Change what is trained in place under torch.no_grad(), or by a "
        "torch.optim.Optimizer; or write_deltas(sparse_deltas(model).values()) of "
        "spt_kernels.layers after changes"
    )
