"""Triton kernels that rebuild a layer's input from what its producer kept: one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# 2,048 elements a program: 16 a thread, so that each reads whole 128-bit words. 128 columns divide
# the common widths (384, 768, 1024) and waste a quarter of a tile on Swin's 96.
_ROWS, _COLS, _FLAT = 16, 128, 2048
_WARPS = 4

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_kernel(
    input_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    n_rows,
    n_cols,
    input_row_stride,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """(x - mean) rstd weight + bias, on a tile of rows and columns."""
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tl.program_id(0) // row_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_mask = rows < n_rows
    col_mask = cols < n_cols
    mask = row_mask[:, None] & col_mask[None, :]
    rows = rows.to(tl.int64)[:, None]

    x = tl.load(input_ptr + rows * input_row_stride + cols[None, :], mask=mask, other=0.0)
    mean = tl.load(mean_ptr + rows, mask=row_mask[:, None], other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=row_mask[:, None], other=0.0).to(tl.float32)
    y = (x.to(tl.float32) - mean) * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]

    # the forward rounded to the dtype of its input before anything else saw the value
    y = y.to(x.dtype).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + rows * n_cols + cols[None, :], y, mask=mask)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """x Φ(x), or its tanh approximation, of fp32."""
    if TANH:
        # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x³)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return y


@triton.jit
def gelu_kernel(input_ptr, output_ptr, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """x Φ(x), or its tanh approximation, over elements in memory order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n

    x_in = tl.load(input_ptr + offsets, mask=mask, other=0.0)
    y = gelu(x_in.to(tl.float32), TANH)

    y = y.to(x_in.dtype).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, y, mask=mask)


def rebuild_layer_norm(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `spt_kernels.ops.rebuild_input.rebuild_layer_norm`."""
    shape, numel = input.shape, input.numel()
    output = input.new_empty(shape, dtype=dtype)
    if numel == 0:
        return output
    n_cols = shape[-1] if normalized_ndim == 1 else shape[len(shape) - normalized_ndim :].numel()
    if input.is_contiguous():
        rows, stride = input, n_cols
    else:
        rows = input.reshape(-1, n_cols)  # [rows, cols], a view wherever there is one
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        stride = rows.stride(0)
    given = (
        rows,
        mean.contiguous(),
        rstd.contiguous(),
        rows if weight is None else weight.contiguous(),
        rows if bias is None else bias.contiguous(),
    )
    sizes = numel // n_cols, n_cols, stride
    has = weight is not None, bias is not None
    dtypes = *[tensor.dtype for tensor in given], dtype
    pointers, aligned = addressed(*given)
    key = input.get_device(), aligned, sizes, has, dtypes
    made = _launches.get(key)
    if made is None:
        n_programs = cdiv(sizes[0], _ROWS) * cdiv(n_cols, _COLS)
        constants = *has, _ROWS, _COLS
        made = _launches.prepare(
            *(key, layer_norm_kernel, n_programs, (*given, output), sizes, (), constants),
            num_warps=_WARPS,
        )
    made.launch(*pointers, pointer_to(output), *made.sizes, *made.constants)
    return output


def rebuild_gelu(input: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """See `spt_kernels.ops.rebuild_input.rebuild_gelu`."""
    output = torch.empty_like(input, dtype=dtype)
    # elements are visited in memory order, which needs input and output to be dense in the same one
    dense = input if input.stride() == output.stride() else torch.empty_like(input).copy_(input)
    n = output.numel()
    if n == 0:
        return output
    gelu_kernel[(cdiv(n, _FLAT),)](
        dense, output, n=n, TANH=approximate == "tanh", BLOCK=_FLAT, num_warps=_WARPS
    )
    return output


def shipped_variants() -> list[Variant]:
    """Each op in each dtype, and LayerNorm from fp32, as autocast runs it, to the narrow ones."""
    return [_gelu_variant(dtype, tanh) for dtype in FLOAT_DTYPES for tanh in (False, True)] + [
        _layer_norm_variant(dtype, out)
        for dtype in FLOAT_DTYPES
        for out in (FLOAT_DTYPES if dtype == torch.float32 else (dtype,))
    ]


def _gelu_variant(dtype: torch.dtype, tanh: bool) -> Variant:
    return Variant(
        name=f"gelu-{'tanh' if tanh else 'none'}-{short_name(dtype)}",
        kernel=gelu_kernel,
        types=dict.fromkeys(("input_ptr", "output_ptr"), POINTER[dtype]),
        constexprs={"TANH": tanh, "BLOCK": _FLAT},
        num_warps=_WARPS,
        load_bits=128,
        store_bits=128,
    )


def _layer_norm_variant(dtype: torch.dtype, out: torch.dtype) -> Variant:
    types = dict.fromkeys(("input_ptr", "weight_ptr", "bias_ptr"), POINTER[dtype])
    flags = {"HAS_WEIGHT": True, "HAS_BIAS": True, "BLOCK_ROWS": _ROWS, "BLOCK_COLS": _COLS}
    return Variant(
        name=f"layer_norm-{short_name(dtype)}-{short_name(out)}",
        kernel=layer_norm_kernel,
        types=types | {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "output_ptr": POINTER[out]},
        constexprs=flags,
        num_warps=_WARPS,
        load_bits=128,
        store_bits=128,
    )
