"""Triton kernels for selected entries of a weight gradient: by vectors, or by sampled tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_plan import TilePlan
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name


@dataclass(frozen=True)
class _TileConfig:
    """How one program computes and samples a tile of `block` rows and columns."""

    block: int
    tokens: int
    entries: int
    num_warps: int
    num_stages: int = 3


# In fp32 the operands are in registers three times over (tf32x3 splits each), hence fewer tokens.
_TILES = {
    (64, False): _TileConfig(block=64, tokens=64, entries=256, num_warps=4),
    (128, False): _TileConfig(block=128, tokens=32, entries=512, num_warps=8),
    (64, True): _TileConfig(block=64, tokens=16, entries=256, num_warps=4),
    (128, True): _TileConfig(block=128, tokens=16, entries=512, num_warps=8),
}
_VECTOR_ENTRIES, _VECTOR_TOKENS, _VECTOR_WARPS = 128, 8, 4

# The cost model: one gathered product costs as much as this many products of a tensor-core tile.
# Estimated from issue rates (a multiprocessor gathers a few values per cycle), not measured.
_TILE_PRODUCTS_PER_GATHER = {torch.float32: 16, torch.bfloat16: 96, torch.float16: 96}

# Tokens are split over programs until about this many of them are under way; no split is shorter
# than `_LEAST_TOKENS`. Partial sums are added in a fixed order afterwards.
_PROGRAMS_WANTED = 512
_LEAST_TOKENS = 512


# no second compilation for counts that happen to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["nnz", "n_tokens", "tokens_per_split"])
def vector_kernel(
    partial_ptr,
    grad_ptr,
    input_ptr,
    index_ptr,
    nnz,
    n_tokens,
    tokens_per_split,
    n_out,
    n_in,
    grad_token_stride,
    grad_out_stride,
    input_token_stride,
    input_in_stride,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """A block of entries over one split of the tokens: both factors are gathered."""
    entry_blocks = tl.cdiv(nnz, BLOCK_ENTRIES)
    split = tl.program_id(0) // entry_blocks
    entries = (tl.program_id(0) % entry_blocks) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    entry_mask = entries < nnz
    flat = tl.load(index_ptr + entries, mask=entry_mask, other=0)
    rows = flat // n_in
    in_range = (flat >= 0) & (rows < n_out)
    columns = (flat % n_in).to(tl.int64)[None, :]
    rows = rows.to(tl.int64)[None, :]
    gather_mask = (entry_mask & in_range)[None, :]
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)

    sums = tl.zeros((BLOCK_TOKENS, BLOCK_ENTRIES), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)[:, None]
        mask = (tokens < last) & gather_mask
        tokens = tokens.to(tl.int64)
        grad_ptrs = grad_ptr + tokens * grad_token_stride + rows * grad_out_stride
        input_ptrs = input_ptr + tokens * input_token_stride + columns * input_in_stride
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        sums += grad * tl.load(input_ptrs, mask=mask, other=0.0).to(tl.float32)

    # a position outside of the weight is never read, and shows
    result = tl.where(in_range, tl.sum(sums, axis=0), float("nan"))
    tl.store(partial_ptr + split.to(tl.int64) * nnz + entries, result, mask=entry_mask)


@triton.jit(do_not_specialize=["n_tiles", "nnz", "n_tokens"])
def tile_kernel(
    partial_ptr,
    grad_ptr,
    input_ptr,
    tiles_ptr,
    order_ptr,
    places_ptr,
    n_tiles,
    nnz,
    n_tokens,
    tokens_per_split,
    n_out,
    n_in,
    grad_token_stride,
    grad_out_stride,
    input_token_stride,
    input_in_stride,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One non-empty tile over one split of the tokens: a product of which the entries are kept."""
    tile = tl.program_id(0) % n_tiles
    split = tl.program_id(0) // n_tiles
    outs = tl.load(tiles_ptr + tile * 4) * BLOCK + tl.arange(0, BLOCK)
    ins = tl.load(tiles_ptr + tile * 4 + 1) * BLOCK + tl.arange(0, BLOCK)
    first_entry = tl.load(tiles_ptr + tile * 4 + 2)
    last_entry = tl.load(tiles_ptr + tile * 4 + 3)
    out_mask = (outs < n_out)[:, None]
    in_mask = (ins < n_in)[None, :]
    # pointers, not values, are transposed: so the copy to shared memory can be asynchronous
    grad_ptrs = grad_ptr + outs.to(tl.int64)[:, None] * grad_out_stride
    input_ptrs = input_ptr + ins.to(tl.int64)[None, :] * input_in_stride
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)

    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        mask = tokens < last
        tokens = tokens.to(tl.int64)
        grad = tl.load(
            grad_ptrs + (tokens * grad_token_stride)[None, :],
            mask=out_mask & mask[None, :],
            other=0.0,
        )
        x = tl.load(
            input_ptrs + (tokens * input_token_stride)[:, None],
            mask=mask[:, None] & in_mask,
            other=0.0,
        )
        if UPCAST:
            grad = grad.to(tl.float32)
            x = x.to(tl.float32)
        product = tl.dot(grad, x, product, input_precision="tf32x3")

    flat = tl.reshape(product, (BLOCK * BLOCK,))
    for start in range(first_entry, last_entry, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)
        mask = entries < last_entry
        places = tl.load(places_ptr + entries, mask=mask, other=0).to(tl.int32)
        order = tl.load(order_ptr + entries, mask=mask, other=0)
        sampled = tl.gather(flat, places, 0)
        tl.store(partial_ptr + split.to(tl.int64) * nnz + order, sampled, mask=mask)


def sparse_weight_grad(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: TilePlan | None
) -> Tensor:
    """See `spt_kernels.ops.sparse_weight_grad.sparse_weight_grad`; without a plan, by vectors."""
    nnz = index.numel()
    if nnz == 0 or len(input) == 0:
        return torch.zeros(nnz, device=input.device)
    gathers = _TILE_PRODUCTS_PER_GATHER[input.dtype] * nnz
    if plan is None or gathers < plan.numel:
        partial = _by_vectors(grad_output, input, index.contiguous())
    else:
        partial = _by_tiles(grad_output, input, plan)
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _by_vectors(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    nnz = index.numel()
    entry_blocks = triton.cdiv(nnz, _VECTOR_ENTRIES)
    splits, tokens_per_split = _split(len(input), entry_blocks, _VECTOR_TOKENS)
    partial = torch.empty(splits, nnz, device=input.device)  # fp32
    vector_kernel[(entry_blocks * splits,)](
        partial,
        grad_output,
        input,
        index,
        nnz,
        len(input),
        tokens_per_split,
        grad_output.shape[1],
        input.shape[1],
        *grad_output.stride(),
        *input.stride(),
        BLOCK_ENTRIES=_VECTOR_ENTRIES,
        BLOCK_TOKENS=_VECTOR_TOKENS,
        num_warps=_VECTOR_WARPS,
        num_stages=2,
    )
    return partial


def _by_tiles(grad_output: Tensor, input: Tensor, plan: TilePlan) -> Tensor:
    if plan.rows.numel():
        grad_output = grad_output.index_select(1, plan.rows)
    if plan.columns.numel():
        input = input.index_select(1, plan.columns)
    config = _TILES[plan.block, input.dtype == torch.float32]
    n_tiles, nnz = len(plan.tiles), plan.order.numel()
    splits, tokens_per_split = _split(len(input), n_tiles, config.tokens)
    partial = torch.empty(splits, nnz, device=input.device)  # fp32
    tile_kernel[(n_tiles * splits,)](
        partial,
        grad_output,
        input,
        plan.tiles,
        plan.order,
        plan.places,
        n_tiles,
        nnz,
        len(input),
        tokens_per_split,
        grad_output.shape[1],
        input.shape[1],
        *grad_output.stride(),
        *input.stride(),
        BLOCK=config.block,
        BLOCK_TOKENS=config.tokens,
        BLOCK_ENTRIES=config.entries,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial


def _split(n_tokens: int, programs: int, block_tokens: int) -> tuple[int, int]:
    """Number of splits, and tokens in each: whole blocks, and decided by shapes alone."""
    wanted = triton.cdiv(_PROGRAMS_WANTED, programs)
    splits = max(1, min(wanted, n_tokens // _LEAST_TOKENS))
    tokens_per_split = triton.cdiv(triton.cdiv(n_tokens, splits), block_tokens) * block_tokens
    return triton.cdiv(n_tokens, tokens_per_split), tokens_per_split


def shipped_variants() -> list[Variant]:
    """Both kernels in each dtype, the tiles in both sizes."""
    return [_vector_variant(dtype) for dtype in FLOAT_DTYPES] + [
        _tile_variant(dtype, _TILES[block, dtype == torch.float32])
        for dtype in FLOAT_DTYPES
        for block in (64, 128)
    ]


def _vector_variant(dtype: torch.dtype) -> Variant:
    pointers = {
        "partial_ptr": "*fp32",
        "grad_ptr": POINTER[dtype],
        "input_ptr": POINTER[dtype],
        "index_ptr": "*i32",
    }
    multiples = ("n_out", "n_in", "grad_token_stride", "input_token_stride")
    return Variant(
        name=f"vector-{short_name(dtype)}",
        kernel=vector_kernel,
        signature=pointers
        | dict.fromkeys(("nnz", "n_tokens", "tokens_per_split", *multiples), "i32"),
        constexprs={
            "grad_out_stride": 1,
            "input_in_stride": 1,
            "BLOCK_ENTRIES": _VECTOR_ENTRIES,
            "BLOCK_TOKENS": _VECTOR_TOKENS,
        },
        num_warps=_VECTOR_WARPS,
        num_stages=2,
        aligned=(*pointers, *multiples),
    )


def _tile_variant(dtype: torch.dtype, config: _TileConfig) -> Variant:
    pointers = {
        "partial_ptr": "*fp32",
        "grad_ptr": POINTER[dtype],
        "input_ptr": POINTER[dtype],
        "tiles_ptr": "*i32",
        "order_ptr": "*i32",
        "places_ptr": "*i16",
    }
    multiples = ("tokens_per_split", "n_out", "n_in", "grad_token_stride", "input_token_stride")
    return Variant(
        name=f"tile-{short_name(dtype)}-{config.block}x{config.block}",
        kernel=tile_kernel,
        signature=pointers | dict.fromkeys(("n_tiles", "nnz", "n_tokens", *multiples), "i32"),
        constexprs={
            "grad_out_stride": 1,
            "input_in_stride": 1,
            "BLOCK": config.block,
            "BLOCK_TOKENS": config.tokens,
            "BLOCK_ENTRIES": config.entries,
            "UPCAST": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *multiples),
        load_bits=128,
    )
