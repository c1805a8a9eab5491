"""Triton kernel of chosen entries of the gradients of a LayerNorm's weight, and of any bias."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, cdiv
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .token_split import split_tokens
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_ENTRIES = 64
# Few entries make few programs, each of which waits for its reads: hence short splits
_LAUNCH = Launch(
    tokens=16, num_warps=4, num_stages=1, programs_per_sm=4, least_tokens=64, most_splits=256
)

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["n_weights", "n_biases", "n_tokens"])
def norm_grad_kernel(
    partial_ptr,
    grad_ptr,
    input_ptr,
    mean_ptr,
    rstd_ptr,
    weight_index_ptr,
    bias_index_ptr,
    n_weights,
    n_biases,
    n_tokens,
    tokens_per_split,
    n_features,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """A block of entries of the weight, or of the bias, over one split of the tokens."""
    weight_blocks = tl.cdiv(n_weights, BLOCK_ENTRIES)
    blocks = weight_blocks + tl.cdiv(n_biases, BLOCK_ENTRIES)
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    is_weight = block < weight_blocks
    if not is_weight:
        block -= weight_blocks
    entries = block * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    of_weight = is_weight & (entries < n_weights)
    of_bias = (not is_weight) & (entries < n_biases)
    columns = tl.load(weight_index_ptr + entries, mask=of_weight, other=0)
    columns += tl.load(bias_index_ptr + entries, mask=of_bias, other=0)
    is_channel = (columns >= 0) & (columns < n_features)
    columns = columns.to(tl.int64)[None, :]
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)

    sums = tl.zeros((BLOCK_TOKENS, BLOCK_ENTRIES), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        in_split = tokens < last
        places = tokens.to(tl.int64)[:, None] * n_features + columns
        mask = in_split[:, None] & ((of_weight | of_bias) & is_channel)[None, :]
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(input_ptr + places, mask=mask & is_weight, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + tokens, mask=in_split & is_weight, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + tokens, mask=in_split & is_weight, other=0.0).to(tl.float32)
        normalized = (x - mean[:, None]) * rstd[:, None]
        sums += grad * tl.where(is_weight, normalized, 1.0)

    partial_ptr += split.to(tl.int64) * (n_weights + n_biases) + tl.where(is_weight, 0, n_weights)
    # a channel that there is none of is never read, and shows
    result = tl.where(is_channel, tl.sum(sums, axis=0), float("nan"))
    tl.store(partial_ptr + entries, result, mask=of_weight | of_bias)


def sparse_norm_grad(
    grad_output: Tensor,
    input: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight_index: Tensor | None,
    bias_index: Tensor | None,
) -> Tensor:
    """See `spt_kernels.ops.sparse_norm_grad.sparse_norm_grad`; all contiguous."""
    n_tokens, n_features = grad_output.shape
    n_weights = 0 if weight_index is None else len(weight_index)
    n_biases = 0 if bias_index is None else len(bias_index)
    if n_tokens == 0 or n_weights + n_biases == 0:
        return torch.zeros(n_weights + n_biases, dtype=torch.float32, device=grad_output.device)
    given: Any = weight_index if bias_index is None else bias_index
    of_weight = given if weight_index is None else weight_index
    of_norm = [grad_output if each is None else each for each in (input, mean, rstd)]
    tensors = grad_output, *of_norm, of_weight, given
    blocks = cdiv(n_weights, _ENTRIES) + cdiv(n_biases, _ENTRIES)
    splits, tokens_per_split = split_tokens(n_tokens, blocks, _LAUNCH, grad_output.device)
    partial = torch.empty(
        splits, n_weights + n_biases, dtype=torch.float32, device=grad_output.device
    )
    sizes = n_weights, n_biases, n_tokens, tokens_per_split, n_features
    dtypes = [each.dtype for each in tensors[:4]]
    pointers, aligned = addressed(*tensors)
    key = grad_output.get_device(), aligned, sizes, *dtypes
    made = _launches.get(key)
    if made is None:
        made = _launches.prepare(
            key,
            norm_grad_kernel,
            blocks * splits,
            (partial, *tensors),
            sizes,
            (),
            (_ENTRIES, _LAUNCH.tokens),
            **_LAUNCH.options,
        )
    made.launch(pointer_to(partial), *pointers, *made.sizes, *made.constants)
    return partial.sum(0) if splits != 1 else partial[0]


def shipped_variants() -> list[Variant]:
    """One per dtype, with statistics in fp32, as a card keeps them."""
    return [
        Variant(
            name=f"norm-{short_name(dtype)}",
            kernel=norm_grad_kernel,
            types=dict.fromkeys(("grad_ptr", "input_ptr"), POINTER[dtype])
            | dict.fromkeys(("partial_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
            | dict.fromkeys(("weight_index_ptr", "bias_index_ptr"), "*i32"),
            constexprs={"BLOCK_ENTRIES": _ENTRIES, "BLOCK_TOKENS": _LAUNCH.tokens},
            programs_per_sm=_LAUNCH.programs_per_sm,
            **_LAUNCH.options,
        )
        for dtype in FLOAT_DTYPES
    ]
