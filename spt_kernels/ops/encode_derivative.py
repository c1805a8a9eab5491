"""The ops that keep an activation's derivative in 2 or 8 bits an element, and multiply by it.

What GELU keeps for its backward is its whole input. Its derivative lies within [-0.13, 1.13], and a
few bits of that are enough for a gradient that is approximate (Yang et al., "Reducing Fine-Tuning
Memory Overhead by Approximate and Memory-Sharing Backpropagation", ICML 2024; Novikov et al.,
"Few-bit Backward", ICML 2023). The activation itself is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..reference import encode_derivative as reference
from .dtypes import FLOATS
from .launching import on_card, register

FUNCTIONS = reference.FUNCTIONS
BITS = (2, 8)

# Of 2 bits: function -> boundary c and levels a, b: f' is 1 - b, 1 - a, a, b for x up to -c, 0, c
# and beyond. They minimise the expected squared error for a standard normal x; by its optimality
# that error has mean zero (`python -m bench.derivative_levels`, which a test holds them to).
TWO_BITS: Mapping[str, tuple[float, float, float]] = {
    "gelu": (0.4989622801, 0.6873249026, 1.0463859279),
    "gelu-tanh": (0.4991942871, 0.6873687172, 1.0463788171),
    "silu": (0.6685287255, 0.6554736452, 0.9664053303),
    "quick-gelu": (0.4633567949, 0.6843710453, 1.0295480376),
}
# Of 8 bits: multiples of 0.005 from -0.13 on, which cover all of these derivatives; off by 0.0025
# at most, and 0 and 1, which they have far from zero, are exact
STEPS, ZERO = 200, 26

# Elements encoded or decoded at a time on a CPU, a multiple of 4: a derivative of all of them in
# fp32 would be as large as what is to be saved
_PIECE = 2**16


def encode_derivative(input: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """An activation, exact, and its derivative in a few bits.

    Args:
        input: any shape and strides, fp32, bf16 or fp16.
        function: `"gelu"`, `"gelu-tanh"`, `"silu"` or `"quick-gelu"`, `x σ(1.702 x)`.
        bits: 2 or 8.

    Returns:
        The activation, of the shape, and where they are dense the strides, of `input`; and codes,
        uint8 `[⌈numel · bits / 8⌉]`, in the order in which the activation lies in memory.

    Raises:
        TypeError: `input` is not one of fp32, bf16, fp16.
        ValueError: no such function, or number of bits.
    """
    _check(input, "input", function, bits)
    return torch.ops.spt.encode_derivative(input, function, bits)  # type: ignore[no-any-return]


def decode_derivative(grad_output: Tensor, codes: Tensor, function: str, bits: int) -> Tensor:
    """The gradient of an activation's input: its output's times the derivative in codes.

    Args:
        grad_output: as dense as the activation and with its strides, fp32, bf16 or fp16.
        codes: of `encode_derivative`, with the same `function` and `bits`.
        function: as there.
        bits: as there.

    Returns:
        Like `grad_output`, multiplied in fp32.

    Raises:
        TypeError: `grad_output` is not one of fp32, bf16, fp16, or the codes are not uint8.
        ValueError: no such function or number of bits; gaps in `grad_output`; another number of
            codes than it needs, or on another device.
    """
    _check(grad_output, "grad_output", function, bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected uint8, got {codes.dtype}")
    n_codes = code_count(grad_output.numel(), bits)
    if codes.shape != (n_codes,) or codes.device != grad_output.device:
        raise ValueError(
            f"codes: expected shape ({n_codes},) on {grad_output.device}, "
            f"got {tuple(codes.shape)} on {codes.device}"
        )
    if torch.empty_like(grad_output, device="meta").stride() != grad_output.stride():
        raise ValueError(f"grad_output: expected no gaps, got strides {grad_output.stride()}")
    return torch.ops.spt.decode_derivative(grad_output, codes, function, bits)  # type: ignore[no-any-return]


def code_count(numel: int, bits: int) -> int:
    """Bytes of the codes of so many elements."""
    return (numel * bits + 7) // 8


def scratch_bytes(tensor: Tensor, bits: int, *, decodes: bool) -> int:
    """What an op on `tensor` holds beside its results while it runs on a CPU."""
    # a comparison for each boundary, or some tensors in fp32; and a cast to that
    an_element = 8 if decodes else {2: 3, 8: 12}[bits]
    is_cast = tensor.element_size() < 4 and an_element < 12
    return min(tensor.numel(), _PIECE) * (an_element + 4 * is_cast)


@functools.cache
def levels_of(function: str, bits: int) -> Tensor:
    """The derivatives that each byte of codes stands for: fp32 `[256, codes in a byte]`."""
    every = torch.arange(256, device="cpu")  # whatever is the default
    if bits == 8:
        return ((every - ZERO) * (1 / STEPS)).view(256, 1)
    of_code = torch.tensor(four_levels(function), device="cpu")
    return of_code[every[:, None] >> 2 * every[:4] & 3]


def four_levels(function: str) -> tuple[float, float, float, float]:
    """The derivatives that the codes 0 to 3 of 2 bits stand for."""
    _, a, b = TWO_BITS[function]
    return 1 - b, 1 - a, a, b


def _check(tensor: Tensor, name: str, function: str, bits: int) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
    if function not in FUNCTIONS:
        raise ValueError(f"function: expected one of {', '.join(FUNCTIONS)}, got {function!r}")
    if bits not in BITS:
        raise ValueError(f"bits: expected 2 or 8, got {bits!r}")


torch.library.define(
    "spt::encode_derivative", "(Tensor input, str function, int bits) -> (Tensor, Tensor)"
)
torch.library.define(
    "spt::decode_derivative",
    "(Tensor grad_output, Tensor codes, str function, int bits) -> Tensor",
)


def launch_encode(input: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """`encode_derivative` without its checks, for a tensor on a CPU or a card."""
    n = input.numel()
    codes = torch.empty(code_count(n, bits), dtype=torch.uint8, device=input.device)
    boundary = TWO_BITS[function][0]
    if not input.is_cpu:
        from ..kernels import encode_derivative as kernels

        output = torch.empty_like(input)
        with on_card(input.device):
            flat = in_memory_order(laid_out_as(output, input))
            kernels.encode(
                flat, in_memory_order(output), codes, function, bits, boundary, STEPS, ZERO
            )
        return output, codes
    output = FUNCTIONS[function](input)
    flat = in_memory_order(laid_out_as(output, input))
    for start in range(0, n, _PIECE):
        piece = flat[start : start + _PIECE]
        first = start * bits // 8
        encoded = reference.encode(piece, function, bits, boundary, STEPS, ZERO)
        codes[first : first + len(encoded)] = encoded
    return output, codes


def launch_decode(grad_output: Tensor, codes: Tensor, function: str, bits: int) -> Tensor:
    """`decode_derivative` without its checks, likewise."""
    grad_input = torch.empty_like(grad_output)
    grads, results = in_memory_order(grad_output), in_memory_order(grad_input)
    if not grad_output.is_cpu:
        from ..kernels import encode_derivative as kernels

        with on_card(grad_output.device):
            kernels.decode(grads, codes, results, bits, four_levels(function), STEPS, ZERO)
        return grad_input
    levels = levels_of(function, bits)
    for start in range(0, len(grads), _PIECE):
        piece = grads[start : start + _PIECE]
        first = start * bits // 8
        some = codes[first : first + code_count(len(piece), bits)]
        results[start : start + _PIECE] = reference.decode(piece, some, levels)
    return grad_input


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor with the strides of another one, itself where it has them."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def in_memory_order(dense: Tensor) -> Tensor:
    """The elements of a tensor without gaps as they lie in memory, `[numel]`, a view."""
    return dense.as_strided((dense.numel(),), (1,))


for _device in ("cpu", "cuda"):
    register("spt::encode_derivative", _device, launch_encode)
    register("spt::decode_derivative", _device, launch_decode)


@torch.library.register_fake("spt::encode_derivative")
def _encode_fake(input: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    n_codes = code_count(input.numel(), bits)
    return torch.empty_like(input), input.new_empty(n_codes, dtype=torch.uint8)


@torch.library.register_fake("spt::decode_derivative")
def _decode_fake(grad_output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad_output)
