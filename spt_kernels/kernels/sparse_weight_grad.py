"""Triton kernel for selected entries of a weight gradient by gathering, and the choice of a way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradient_ways.gradient_cost import Way, Work, cheapest_way
from ..gradient_ways.stored_rates import rates_on
from ..gradient_ways.tile_plan import TilePlan
from .card import Launch, cdiv
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .sampled_tiles import by_tiles
from .take import take_entries
from .token_split import split_tokens
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# 256 entries share what they read of a token's row: fewer, and each program reads the row again
_ENTRIES = 256
# A program waits for each of its reads: few entries need many programs, whose splits are short
LAUNCH = Launch(
    tokens=4, num_warps=4, num_stages=2, programs_per_sm=7, least_tokens=64, most_splits=256
)
_launches = PreparedLaunches()
_BLOCKS = {"BLOCK_ENTRIES": _ENTRIES, "BLOCK_TOKENS": LAUNCH.tokens}

# A dense gradient of at most so many elements is made whole, 32 MB of fp32; else in blocks of rows
_DENSE_NUMEL = 1 << 23
_DENSE_BLOCK_NUMEL = 1 << 22


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


def sparse_weight_grad(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: TilePlan | None
) -> Tensor:
    """See `spt_kernels.ops.sparse_weight_grad.sparse_weight_grad`; a plan allows tiles."""
    nnz = index.numel()
    if nnz == 0 or len(input) == 0:
        return torch.zeros(nnz, dtype=torch.float32, device=input.device)
    way = _way(plan, nnz, grad_output.shape[1], input)
    if way is Way.DENSE:
        if plan is not None and grad_output.shape[1] * input.shape[1] <= _DENSE_NUMEL:
            return by_dense(grad_output, input, index)
        return by_dense_blocks(grad_output, input, index)
    if way is Way.VECTORS or plan is None:
        partial = by_vectors(grad_output, input, index.contiguous())
    else:
        partial = by_tiles(grad_output, input, plan)
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _way(plan: TilePlan | None, nnz: int, out_features: int, input: Tensor) -> Way:
    """The cheapest, estimated once for a plan: the estimate takes longer than its launch."""
    is_fp32 = input.dtype is torch.float32
    # asked for where it matters: the answer takes a host as long as a small launch
    allows_tf32 = is_fp32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    key = out_features, input.shape[1], input.dtype, allows_tf32
    known = {} if plan is None else plan.ways
    if key not in known:
        known[key] = cheapest_way(
            Work.of(plan, nnz, (out_features, input.shape[1])),
            rates_on(input.device),
            is_fp32=is_fp32,
            allows_tf32=allows_tf32,
        )
    return known[key]


def by_vectors(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """Partial sums `[splits, nnz]`."""
    nnz = index.numel()
    entry_blocks = cdiv(nnz, _ENTRIES)
    splits, tokens_per_split = split_tokens(len(input), entry_blocks, LAUNCH, input.device)
    partial = torch.empty(splits, nnz, dtype=torch.float32, device=input.device)
    tensors = grad_output, input, index
    pointers, aligned = addressed(*tensors)
    shapes = grad_output.shape[1], input.shape[1], *grad_output.stride(), *input.stride()
    sizes = nnz, len(input), tokens_per_split, *shapes
    key = input.get_device(), aligned, input.dtype, sizes, LAUNCH
    made = _launches.get(key)
    if made is None:
        constants = tuple(_BLOCKS.values())
        made = _launches.prepare(
            key,
            vector_kernel,
            entry_blocks * splits,
            (partial, *tensors),
            sizes,
            (),
            constants,
            **LAUNCH.options,
        )
    made.launch(pointer_to(partial), *pointers, *made.sizes, *made.constants)
    return partial


def by_dense(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """Entries of torch's product, `[nnz]`, at positions that lie in it: two launches."""
    return take_entries(_product(grad_output.T, input), index.contiguous())


def by_dense_blocks(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """Entries of torch's product, some rows at a time, `[nnz]`, at any positions."""
    n_rows, n_columns = grad_output.shape[1], input.shape[1]
    rows = index // n_columns
    in_range = (index >= 0) & (rows < n_rows)
    # a position outside of the weight shows, as by vectors
    result = torch.full_like(index, float("nan"), dtype=torch.float32)  # [nnz]
    rows_per_block = max(1, _DENSE_BLOCK_NUMEL // n_columns)
    for first in range(0, n_rows, rows_per_block):
        block = _product(grad_output[:, first : first + rows_per_block].T, input).flatten()
        within = in_range & (rows >= first) & (rows < first + rows_per_block)
        places = (index.long() - first * n_columns).clamp_(0, len(block) - 1)
        result = torch.where(within, block[places], result)
    return result


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, summed and returned in fp32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type != "cuda":  # the interpreter's: only CUDA's product widens its result
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def shipped_variants() -> list[Variant]:
    """One per dtype."""
    return [
        Variant(
            name=f"vector-{short_name(dtype)}",
            kernel=vector_kernel,
            types={"partial_ptr": "*fp32", "index_ptr": "*i32"}
            | dict.fromkeys(("grad_ptr", "input_ptr"), POINTER[dtype]),
            constexprs={"grad_out_stride": 1, "input_in_stride": 1, **_BLOCKS},
            programs_per_sm=LAUNCH.programs_per_sm,
            **LAUNCH.options,
        )
        for dtype in FLOAT_DTYPES
    ]
