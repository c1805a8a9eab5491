"""Top-τ: the positions of the largest scores over a list of tensors that are never joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..reference import top_tau as reference

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
    tensors = list(tensors)
    calls = validate(tensors, k, caps, names)
    if not tensors:
        if k:
            raise ValueError(f"k is {k}, but tensors is empty")
        return []
    scores = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    scores = [score if score.is_contiguous() else score.contiguous() for score in scores]
    most = [score.numel() for score in scores]
    capped = most if caps is None else [min(cap, _INT64_MAX) for cap in caps]
    if k > _INT64_MAX:
        _explain([score.view(-1) for score in scores], k, capped, calls)
    try:
        return list(torch.ops.spt.top_tau(scores, k, capped))
    except ValueError:
        # whichever backend objects, the message is the same and names the tensor
        _explain([score.view(-1) for score in scores], k, capped, calls)
        raise


def validate(
    tensors: list[Tensor], k: int, caps: Sequence[int] | None, names: Sequence[str] | None
) -> list[str]:
    """What to call the tensors, if the arguments of `top_tau` fit together, values aside."""
    calls = [f"tensors[{m}]" for m in range(len(tensors))] if names is None else list(names)
    if len(calls) != len(tensors):
        raise ValueError(f"names has {len(calls)} items, expected {len(tensors)}, one per tensor")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {k!r}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    for call, tensor in zip(calls, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{call} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{call} must be float32 or bfloat16, got {tensor.dtype}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{call} is on {tensor.device}, but {calls[0]} is on {tensors[0].device}: "
                "all tensors must be on one device"
            )
    if caps is not None:
        if len(caps) != len(tensors):
            raise ValueError(f"caps has {len(caps)} items, expected {len(tensors)}, one per tensor")
        for call, cap in zip(calls, caps, strict=True):
            if cap < 0:
                raise ValueError(f"the cap of {call} must not be negative, got {cap}")
    return calls


def _explain(tensors: list[Tensor], k: int, caps: list[int], calls: list[str]) -> None:
    """Raise the error that says which tensor is at fault, or how many scores can be selected."""
    reachable = 0
    for tensor, cap, call in zip(tensors, caps, calls, strict=True):
        for fault, where in (
            ("NaN", tensor.isnan()),
            ("infinite", tensor.isinf()),
            ("negative", tensor < 0),
        ):
            if where.any():
                at = int(where.nonzero()[0])
                raise ValueError(
                    f"{call} holds {int(where.sum())} {fault} score(s), the first at flat position "
                    f"{at}: scores must be finite and not negative"
                ) from None
        reachable += min(int((tensor > 0).sum()), cap)
    if k > reachable:
        raise ValueError(
            f"k is {k}, but only {reachable} positive scores can be counted"
            f" in {len(tensors)} tensors"
        ) from None


@torch.library.register_kernel("spt::top_tau", "cpu")
def _cpu(tensors: list[Tensor], k: int, caps: list[int]) -> list[Tensor]:
    backend = native if native.available() else reference
    return backend.top_tau(tensors, k, caps)


@torch.library.register_kernel("spt::top_tau", "cuda")
def _cuda(tensors: list[Tensor], k: int, caps: list[int]) -> list[Tensor]:
    from ..kernels import top_tau as kernels

    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        return kernels.top_tau(tensors, k, caps)


@torch.library.register_fake("spt::top_tau")
def _fake(tensors: list[Tensor], k: int, caps: list[int]) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [t.new_empty(context.new_dynamic_size(), dtype=torch.int64) for t in tensors]
