"""Triton kernels that keep an activation's derivative in a few bits: one pass each way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# 2,048 elements a program: 16 a thread, which are four bytes of codes of 2 bits
_BLOCK, _WARPS = 2048, 4


@triton.jit
def _gate_and_slope(x, FUNCTION: tl.constexpr):
    """The activation is x · gate, its derivative gate + x · slope."""
    if FUNCTION == "gelu":
        gate = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        slope = tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        if FUNCTION == "gelu-tanh":
            # 0.5 (1 + tanh u) = σ(2 u), u = sqrt(2 / pi) (x + 0.044715 x³)
            v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        elif FUNCTION == "quick-gelu":
            v = 1.702 * x
            slope = 1.702
        else:
            v = x
            slope = 1.0
        gate = 1.0 / (1.0 + tl.exp(-v))
        slope = slope * gate * (1.0 - gate)
    return gate, slope


@triton.jit
def encode_kernel(
    input_ptr,
    output_ptr,
    codes_ptr,
    n,
    FUNCTION: tl.constexpr,
    BITS: tl.constexpr,
    BOUNDARY: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The activation, and its derivative's codes, four of 2 bits to a byte."""
    PER_BYTE: tl.constexpr = 8 // BITS
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n

    x_in = tl.load(input_ptr + offsets, mask=mask, other=0.0)
    x = x_in.to(tl.float32)
    gate, _ = _gate_and_slope(x, FUNCTION)
    tl.store(output_ptr + offsets, (x * gate).to(x_in.dtype), mask=mask)

    if BITS == 2:
        codes = (x > -BOUNDARY).to(tl.int32) + (x > 0.0).to(tl.int32) + (x > BOUNDARY).to(tl.int32)
        places = tl.reshape(tl.where(mask, codes, 0), (BLOCK // 4, 4))
        encoded = tl.sum(places << (2 * tl.arange(0, 4))[None, :], axis=1)
    else:
        near = tl.minimum(tl.maximum(x, -20.0), 20.0)  # beyond it a derivative is 0 or 1
        gate, slope = _gate_and_slope(near, FUNCTION)
        encoded = tl.floor((gate + near * slope) * STEPS + (ZERO + 0.5)).to(tl.int32)

    bytes = tl.program_id(0).to(tl.int64) * (BLOCK // PER_BYTE) + tl.arange(0, BLOCK // PER_BYTE)
    tl.store(codes_ptr + bytes, encoded.to(tl.uint8), mask=bytes < tl.cdiv(n, PER_BYTE))


@triton.jit
def decode_kernel(
    grad_output_ptr,
    codes_ptr,
    grad_input_ptr,
    n,
    BITS: tl.constexpr,
    LEVEL_0: tl.constexpr,
    LEVEL_1: tl.constexpr,
    LEVEL_2: tl.constexpr,
    LEVEL_3: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_output times the derivative that its code stands for."""
    PER_BYTE: tl.constexpr = 8 // BITS
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    bytes = tl.program_id(0).to(tl.int64) * (BLOCK // PER_BYTE) + tl.arange(0, BLOCK // PER_BYTE)

    grad = tl.load(grad_output_ptr + offsets, mask=mask, other=0.0)
    encoded = tl.load(codes_ptr + bytes, mask=bytes < tl.cdiv(n, PER_BYTE), other=0).to(tl.int32)
    if BITS == 2:
        places = encoded[:, None] >> (2 * tl.arange(0, 4))[None, :] & 3
        code = tl.reshape(places, (BLOCK,))
        lower = tl.where(code == 0, LEVEL_0, LEVEL_1)
        derivative = tl.where(code < 2, lower, tl.where(code == 2, LEVEL_2, LEVEL_3))
    else:
        derivative = (encoded - ZERO).to(tl.float32) * (1.0 / STEPS)

    tl.store(grad_input_ptr + offsets, (grad.to(tl.float32) * derivative).to(grad.dtype), mask=mask)


def encode(
    input: Tensor,
    output: Tensor,
    codes: Tensor,
    function: str,
    bits: int,
    boundary: float,
    steps: int,
    zero: int,
) -> None:
    """Write `output` and `codes` of an input `[n]`: `reference.encode_derivative.encode`."""
    n = input.numel()
    if n == 0:
        return
    encode_kernel[(cdiv(n, _BLOCK),)](
        *(input, output, codes),
        n=n,
        FUNCTION=function,
        BITS=bits,
        BOUNDARY=boundary,
        STEPS=steps,
        ZERO=zero,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def decode(
    grad_output: Tensor,
    codes: Tensor,
    grad_input: Tensor,
    bits: int,
    levels: tuple[float, float, float, float],
    steps: int,
    zero: int,
) -> None:
    """Write `grad_input` `[n]`, likewise."""
    n = grad_output.numel()
    if n == 0:
        return
    decode_kernel[(cdiv(n, _BLOCK),)](
        *(grad_output, codes, grad_input),
        n=n,
        BITS=bits,
        **{f"LEVEL_{code}": level for code, level in enumerate(levels)},
        STEPS=steps,
        ZERO=zero,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def shipped_variants() -> list[Variant]:
    """Each dtype and number of bits; the other functions once, with all that they compute."""
    every = [("gelu", bits, dtype) for bits in (2, 8) for dtype in FLOAT_DTYPES]
    every += [(function, 8, FLOAT_DTYPES[1]) for function in ("gelu-tanh", "silu", "quick-gelu")]
    encoders = [
        Variant(
            name=f"encode-{function}-{bits}bit-{short_name(dtype)}",
            kernel=encode_kernel,
            types=dict.fromkeys(("input_ptr", "output_ptr"), POINTER[dtype]) | {"codes_ptr": "*u8"},
            constexprs={"FUNCTION": function, "BITS": bits, "BOUNDARY": 0.5} | _CONSTANTS,
            num_warps=_WARPS,
            load_bits=128,
        )
        for function, bits, dtype in every
    ]
    decoders = [
        Variant(
            name=f"decode-{bits}bit-{short_name(dtype)}",
            kernel=decode_kernel,
            types=dict.fromkeys(("grad_output_ptr", "grad_input_ptr"), POINTER[dtype])
            | {"codes_ptr": "*u8"},
            constexprs={"BITS": bits} | _FOUR_LEVELS | _CONSTANTS,
            num_warps=_WARPS,
            store_bits=128,
        )
        for bits in (2, 8)
        for dtype in FLOAT_DTYPES
    ]
    return encoders + decoders


# Which numbers they are makes no other code
_CONSTANTS = {"STEPS": 200, "ZERO": 26, "BLOCK": _BLOCK}
_FOUR_LEVELS = {"LEVEL_0": -0.05, "LEVEL_1": 0.3, "LEVEL_2": 0.7, "LEVEL_3": 1.05}
