"""AdamW on the trained values and the write of base + delta, in `torch.optim.AdamW`'s own steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF


def sparse_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    hyper: Tensor,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """See `spt_kernels.ops.sparse_adamw`; `hyper` is `[entries, 8]` fp64."""
    for n, row in enumerate(hyper.tolist()):
        lr, beta1, beta2, eps, weight_decay, step, maximize, entry_id = row
        if step < 1:
            continue  # an overflow was found in the gradients: this step does not happen
        param, exp_avg, exp_avg_sq = params[n], exp_avgs[n], exp_avg_sqs[n]
        grad = -grads[n] if maximize else grads[n]

        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))

        target = targets[n]
        if target.numel() == 0:
            continue
        value = originals[n].float() + param.view(-1)
        if stochastic_rounding and target.dtype != torch.float32:
            bits = random_bits(value.numel(), seed, int(step), int(entry_id), value.device)
            value = round_stochastically(value, bits, target.dtype)
        target.view(-1)[indices[n].long()] = value.to(target.dtype)


def random_bits(n: int, seed: int, step: int, entry_id: int, device: torch.device) -> Tensor:
    """32 random bits for each value of an entry, int64 `[n]`, the same in every backend."""
    stream = _mix(torch.tensor((seed ^ (step * 0x9E3779B9)) & _UINT32, device="cpu"))
    stream ^= (entry_id * 0x85EBCA6B) & _UINT32
    return _mix(stream.to(device) ^ torch.arange(n, device=device))


def _mix(x: Tensor) -> Tensor:
    # lowbias32, in int64 because torch has no unsigned shifts. A 63-bit product wraps to the right
    # low 32 bits, which is all that is kept.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def round_stochastically(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` (fp32) rounded to bf16 or fp16 up or down, the nearer the likelier, without bias.

    Random bits are added below the last bit that is kept, and the rest is cut off. Infinities and
    NaN, and what fp16 holds as a subnormal or not at all, are rounded to nearest.
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    low_bits = (1 << dropped) - 1
    bits = value.view(torch.int32).long() & _UINT32
    magnitude = bits & 0x7FFFFFFF
    rounded = (bits + (random & low_bits)) & (_UINT32 ^ low_bits)
    if dtype == torch.bfloat16:
        applies = magnitude < 0x7F800000  # finite
    else:
        applies = (magnitude >= 0x38800000) & (magnitude < 0x477FE000)  # 2^-14 <= |value| < 65504
    # int64 -> int32 keeps the low 32 bits
    return torch.where(applies, rounded.to(torch.int32).view(torch.float32), value).to(dtype)
