"""Triton kernel of AdamW on many small parameters, the write of base + delta included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import address_table, find_row, upload
from .variant import Variant
from .write_delta import TARGET_KIND

BLOCK, WARPS = 1024, 4


@triton.jit
def mix(x):
    """The 32-bit hash lowbias32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D).to(tl.uint32)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def round_stochastically(value, random, DTYPE: tl.constexpr):
    """fp32 values that DTYPE holds exactly, except where rounding to nearest is right.

    Random bits are added below the last bit that is kept, and the rest is cut off.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if DTYPE.is_bf16():
        rounded = (bits + (random & 0xFFFF)) & 0xFFFF0000
        applies = magnitude < 0x7F800000
    else:
        # the normal numbers of fp16: 2^-14 <= |value| < 65504
        rounded = (bits + (random & 0x1FFF)) & 0xFFFFE000
        applies = (magnitude >= 0x38800000) & (magnitude < 0x477FE000)
    return tl.where(applies, rounded.to(tl.uint32), bits).to(tl.float32, bitcast=True)


@triton.jit
def write_weight(
    target_address, original_address, position, param, random, offsets, mask, DTYPE: tl.constexpr
):
    """original + param to target[position], rounded to nearest or, given random bits, by them."""
    target_ptr = target_address.to(tl.pointer_type(DTYPE))
    original_ptr = original_address.to(tl.pointer_type(DTYPE))

    value = tl.load(original_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + param
    if random is not None:
        value = round_stochastically(value, random, DTYPE)

    tl.store(target_ptr + position, value.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["table", "grads", "numbers", "n_entries", "seed", "grad_scale"])
def sparse_adamw_kernel(
    table: tl.int64,
    grads: tl.int64,
    numbers: tl.int64,
    n_entries,
    seed: tl.int64,
    grad_scale: tl.int64,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program updates one block of one entry. Addresses come as numbers, 0 for no scale."""
    table_ptr = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    entry = find_row(table_ptr, n_entries, 9).to(tl.int64)
    row_ptr = table_ptr + entry * 9
    number_ptr = numbers.to(tl.int64).to(tl.pointer_type(tl.float64)) + entry * 10
    step = tl.load(number_ptr + 8).to(tl.int64)
    offsets = (tl.program_id(0) - tl.load(row_ptr)) * BLOCK + tl.arange(0, BLOCK)
    mask = (offsets < tl.load(row_ptr + 1)) & (step >= 1)

    grad_address = tl.load(grads.to(tl.int64).to(tl.pointer_type(tl.int64)) + entry)
    grad_ptr = grad_address.to(tl.pointer_type(tl.float32)) + offsets
    param_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32)) + offsets
    exp_avg_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + offsets
    exp_avg_sq_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32)) + offsets
    grad = tl.load(grad_ptr, mask=mask, other=0.0)
    if grad_scale != 0:
        grad = tl.div_rn(grad, tl.load(grad_scale.to(tl.int64).to(tl.pointer_type(tl.float32))))
        tl.store(grad_ptr, grad, mask=mask)
    grad *= tl.load(number_ptr + 0).to(tl.float32)
    param = tl.load(param_ptr, mask=mask, other=0.0) * tl.load(number_ptr + 1).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr, mask=mask, other=0.0)

    # torch interpolates from the nearer end
    weight = tl.load(number_ptr + 2).to(tl.float32)
    gap = grad - exp_avg
    exp_avg = tl.where(weight < 0.5, exp_avg + weight * gap, grad - gap * (1.0 - weight))
    exp_avg_sq = exp_avg_sq * tl.load(number_ptr + 3).to(tl.float32)
    exp_avg_sq += grad * grad * tl.load(number_ptr + 4).to(tl.float32)
    correction = tl.load(number_ptr + 5).to(tl.float32)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction)
    denominator += tl.load(number_ptr + 6).to(tl.float32)
    param += tl.load(number_ptr + 7).to(tl.float32) * tl.div_rn(exp_avg, denominator)

    tl.store(param_ptr, param, mask=mask)
    tl.store(exp_avg_ptr, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr, exp_avg_sq, mask=mask)

    kind = tl.load(row_ptr + 8)
    if kind > 0:
        target = tl.load(row_ptr + 5)
        original = tl.load(row_ptr + 7)
        index_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.int32))
        position = tl.load(index_ptr + offsets, mask=mask, other=0).to(tl.int64)
        random = None
        if STOCHASTIC:
            stream = mix((seed ^ (step * 0x9E3779B9)).to(tl.uint32))
            stream ^= (tl.load(number_ptr + 9).to(tl.int64) * 0x85EBCA6B).to(tl.uint32)
            random = mix(stream ^ offsets.to(tl.uint32))
        if kind == 1:
            write_weight(target, original, position, param, None, offsets, mask, tl.float32)
        elif kind == 2:
            write_weight(target, original, position, param, random, offsets, mask, tl.bfloat16)
        else:
            write_weight(target, original, position, param, random, offsets, mask, tl.float16)


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
    """See `spt_kernels.ops.sparse_adamw`; `hyper` is on the device or on the CPU."""
    table, n_programs = entry_table(params, exp_avgs, exp_avg_sqs, targets, indices, originals)
    if n_programs == 0:
        return
    device = params[0].device
    table = upload(table, device)
    grad_addresses = upload(torch.tensor([grad.data_ptr() for grad in grads], device="cpu"), device)
    numbers = numbers_of(hyper)
    if numbers.device.type == "cpu":
        numbers = upload(numbers, device)
    sparse_adamw_kernel[(n_programs,)](
        table.data_ptr(),
        grad_addresses.data_ptr(),
        numbers.data_ptr(),
        n_entries=len(params),
        seed=seed & 0xFFFFFFFF,
        grad_scale=0,
        STOCHASTIC=stochastic_rounding,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def entry_table(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
) -> tuple[Tensor, int]:
    """What the kernel is told of entries that stays from step to step, and its programs."""
    kinds = [TARGET_KIND[target.dtype] if target.numel() else 0 for target in targets]
    tensors: list[Sequence[Tensor | int]] = [params, exp_avgs, exp_avg_sqs]
    columns = [*tensors, targets, indices, originals, kinds]
    return address_table([param.numel() for param in params], BLOCK, columns)


def numbers_of(hyper: Tensor) -> Tensor:
    """What the kernel multiplies with, fp64 `[entries, 10]`, from lr, beta1, beta2, ...

    Powers in double precision, once per entry here rather than once per thread there, and on the
    device when the steps are counted there.
    """
    lr, beta1, beta2, eps, weight_decay, step, maximize, entry_id = hyper.unbind(1)
    columns = [
        1 - 2 * maximize,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step).sqrt(),
        eps,
        -lr / (1 - beta1**step),
        step,
        entry_id,
    ]
    return torch.stack(columns, dim=1)


def shipped_variants() -> list[Variant]:
    """Both ways of rounding; target dtypes are told apart at run time, so one launch serves all."""
    return [
        Variant(
            name=name,
            kernel=sparse_adamw_kernel,
            types={},
            constexprs={"STOCHASTIC": name == "stochastic", "BLOCK": BLOCK},
            num_warps=WARPS,
        )
        for name in ("nearest", "stochastic")
    ]
