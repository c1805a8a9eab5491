"""Top-τ: the positions of the largest scores over a list of tensors that are never joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..reference import top_tau as reference
from .launching import may_launch_all, on_card, register

_DTYPES = (torch.float32, torch.bfloat16)
_INT64_MAX = 2**63 - 1  # more than any tensor has, and all that an op can be given

torch.library.define("spt::top_tau", "(Tensor[] tensors, int k, SymInt[] caps) -> Tensor[]")


def top_tau(
    tensors: Sequence[Tensor],
    k: int,
    caps: Sequence[int] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Select the most sensitive positions over all tensors together (the paper's Eq. 4).

    Scores are ranked by value, highest first; ties go to the earlier tensor, then to the lower flat
    position. The result is the shortest prefix of that ranking that counts for `k`, where tensor
    `m` counts for `min(selected in m, caps[m])`: with caps, a tensor may have more positions
    selected than it counts for. Scores of 0 are never selected.

    Args:
        tensors: scores, fp32 or bf16, any shape, all on one device; finite and not negative.
        k: what the selection counts for, at least 0.
        caps: the most that each tensor counts for; None counts every position, the plain top-k.
        names: what to call the tensors in messages, instead of their place in the list.

    Returns:
        For each tensor its selected flat positions: int64 `[n]`, ascending, on its device; on CUDA
        all of them are parts of one buffer.

    Raises:
        ValueError: a score is NaN, infinite or negative; the positive scores do not reach `k`;
            lengths or devices do not fit.
        TypeError: a tensor is of another dtype.
    """
    tensors, names = list(tensors), None if names is None else list(names)
    validate(tensors, k, caps, names)
    if not tensors:
        if k:
            raise ValueError(f"k is {k}, but tensors is empty")
        return []
    scores = [t if t.is_contiguous() else t.detach().contiguous() for t in tensors]
    most = [_INT64_MAX] * len(scores)
    capped = most if caps is None else list(map(min, caps, most))
    if k > _INT64_MAX:
        _explain(scores, k, capped, names)
    try:
        if may_launch_all(scores):
            launch = _cuda if scores[0].is_cuda else _cpu
            return launch(scores, k, capped)
        scores = [score.detach() if score.requires_grad else score for score in scores]
        return list(torch.ops.spt.top_tau(scores, k, capped))
    except ValueError:
        # whichever backend objects, the message is the same and names the tensor
        _explain(scores, k, capped, names)
        raise


def validate(
    tensors: list[Tensor], k: int, caps: Sequence[int] | None, names: Sequence[str] | None
) -> None:
    """Refuse arguments of `top_tau` that do not fit together, values aside."""
    n_tensors = len(tensors)
    if names is not None and len(names) != n_tensors:
        raise ValueError(f"names has {len(names)} items, expected {n_tensors}, one per tensor")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {k!r}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    for m, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_call(m, names)} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{_call(m, names)} must be float32 or bfloat16, got {tensor.dtype}")
    devices = [tensor.device for tensor in tensors]
    if devices and devices.count(devices[0]) < n_tensors:
        m = next(m for m, device in enumerate(devices) if device != devices[0])
        raise ValueError(
            f"{_call(m, names)} is on {devices[m]}, but {_call(0, names)} is on {devices[0]}: "
            "all tensors must be on one device"
        )
    if caps is not None:
        if len(caps) != n_tensors:
            raise ValueError(f"caps has {len(caps)} items, expected {n_tensors}, one per tensor")
        for m, cap in enumerate(caps):
            if cap < 0:
                raise ValueError(f"the cap of {_call(m, names)} must not be negative, got {cap}")


def _call(m: int, names: Sequence[str] | None) -> str:
    """What a message calls a tensor."""
    return f"tensors[{m}]" if names is None else list(names)[m]


def _explain(tensors: list[Tensor], k: int, caps: list[int], names: Sequence[str] | None) -> None:
    """Raise the error that says which tensor is at fault, or how many scores can be selected."""
    reachable = 0
    for m, (score, cap) in enumerate(zip(tensors, caps, strict=True)):
        tensor = score.detach().view(-1)
        for fault, where in (
            ("NaN", tensor.isnan()),
            ("infinite", tensor.isinf()),
            ("negative", tensor < 0),
        ):
            if where.any():
                at = int(where.nonzero()[0])
                raise ValueError(
                    f"{_call(m, names)} holds {int(where.sum())} {fault} score(s), the first at "
                    f"flat position {at}: scores must be finite and not negative"
                ) from None
        reachable += min(int((tensor > 0).sum()), cap)
    if k > reachable:
        raise ValueError(
            f"k is {k}, but only {reachable} positive scores can be counted"
            f" in {len(tensors)} tensors"
        ) from None


def _cpu(tensors: list[Tensor], k: int, caps: list[int]) -> list[Tensor]:
    backend = native if native.available() else reference
    return backend.top_tau(tensors, k, caps)


def _cuda(tensors: list[Tensor], k: int, caps: list[int]) -> list[Tensor]:
    from ..kernels import top_tau as kernels

    with on_card(tensors[0].device):
        return kernels.top_tau(tensors, k, caps)


register("spt::top_tau", "cpu", _cpu)
register("spt::top_tau", "cuda", _cuda)


@torch.library.register_fake("spt::top_tau")
def _fake(tensors: list[Tensor], k: int, caps: list[int]) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [t.new_empty(context.new_dynamic_size(), dtype=torch.int64) for t in tensors]
