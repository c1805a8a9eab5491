"""What a CUDA device does otherwise than a CPU in a training step, as far as memory goes.

Autograd cannot run a backward on fake CUDA tensors where there is no CUDA driver. So the step runs
on fake CPU tensors, and the operations that keep or make something else on CUDA are led to the
operators that CUDA has, whose meta functions know the sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..ops.dtypes import FLOATS, FLOATS_OF_16_BITS
from ..ops.launching import as_on_card
from ..ops.low_rank_ways import MOST_COLUMNS, serves
from .ledger import Ledger
from .quantized import scratch_of_4_bits

# What autocast computes in fp32 on CUDA but, on a CPU, in the dtype that it finds
_IN_FP32 = frozenset(
    getattr(space, name)
    for space in (torch, Tensor, F)
    for name in (
        *("layer_norm", "group_norm", "rms_norm", "norm", "cosine_similarity"),
        *("softmax", "log_softmax", "logsumexp", "cross_entropy", "softplus", "interpolate"),
        *("exp", "log", "pow", "rsqrt", "cumsum", "tan"),
    )
    if hasattr(space, name)
)
# Of the gradient of a LoRA's factor on an H100, as `kernels.low_rank_grad` has them: programs at
# once; bytes of a token that each reads at a time, and tokens; tokens of a part, and how many parts
_GRAD_PROGRAMS, _GRAD_BYTES, _GRAD_TOKENS = 396, 256, 32
_LEAST_TOKENS, _MOST_SPLITS = 128, 128
_MASK_ALIGNMENT = 8  # rows of a mask that are no multiple of this are padded to one


class CudaLedger(Ledger):
    """A ledger of fake CPU tensors that, while active, are computed with as on CUDA.

    What kernels allocate within themselves is counted for flash attention, for products with
    weights of 4 bits and for the gradient of a LoRA only: the workspaces of cuBLAS (8 MiB, on
    Hopper 32) and of cuDNN's convolutions come on top.
    """

    BLOCK_BYTES = 512  # the caching allocator hands out multiples of this

    def __enter__(self) -> CudaLedger:
        self._as_on_cuda = AsOnCuda()
        self._as_on_cuda.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._as_on_cuda.__exit__(*raised)

    def scratch_bytes(self, func: Any, args: tuple[Any, ...]) -> int:
        """An fp32 gradient of the query and one number for each of its rows; a weight as floats.

        Of the gradient of a LoRA's factor the sums of all parts of the tokens.
        """
        if func is torch.ops.spt.low_rank_grad.default:
            return _partial_sums(*args)
        if func is not torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
            return scratch_of_4_bits(func, args)
        batch, heads, tokens, width = args[1].shape
        return 4 * batch * heads * _rounded(tokens, 128) * (_rounded(width, 32) + 1)


def _partial_sums(input: Tensor, grad_inner: Tensor, *others: Any) -> int:
    """Bytes of them, about: a few parts more or less where the programs fill the card better."""
    n_tokens, n_features = input.shape
    rank, dtype = grad_inner.shape[1], grad_inner.dtype
    if not serves(dtype, rank):
        return 0
    is_made = len(others) > 3 and others[3] != "none"  # of something else, an activation
    features = _GRAD_BYTES // dtype.itemsize
    if is_made or rank > MOST_COLUMNS[dtype] // 2:
        features //= 2
    blocks = -(-n_features // features)
    parts = min(_MOST_SPLITS, n_tokens // _LEAST_TOKENS, _GRAD_PROGRAMS // blocks)
    if parts <= 1:
        return 0
    parts = -(-n_tokens // _rounded(-(-n_tokens // parts), _GRAD_TOKENS))
    return 4 * parts * rank * n_features


def take_default_path(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer step by lists of tensors where it is left to torch, as torch does on CUDA.

    That is faster, and makes temporary tensors as large as all the parameters.
    """
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


def run_backward(loss: Tensor) -> None:
    """`loss.backward()` in which function modes stay active.

    That is a torch function itself, within which the mode is off; but with checkpointing blocks
    are computed again in it.
    """
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    ones = torch.ones_like(loss)
    engine.run_backward(
        (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class AsOnCuda(TorchFunctionMode):
    """While active, CPU tensors are computed with as tensors on a CUDA card of sm_80 or newer.

    Attention takes the flash or the memory-efficient kernel wherever CUDA would, which keep no
    attention matrix; dropout keeps a mask of bytes instead of factors; under autocast, norms and
    softmax give fp32. For fake tensors only: no CPU can run the kernels that are chosen.
    """

    def __enter__(self) -> AsOnCuda:
        self._ways = as_on_card()
        self._ways.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._ways.__exit__(*raised)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.normalize:
            return _normalize(*args, **kwargs)
        if func in _IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return (
        value.float() if isinstance(value, Tensor) and value.dtype in FLOATS_OF_16_BITS else value
    )


def _normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    wide = _widened(input) if torch.is_autocast_enabled("cpu") else input
    return input / wide.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(input)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and not inplace and 0 < p < 1:
        return torch.native_dropout(input, p, True)[0]
    return F.dropout(input, p, training, inplace)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that CUDA would choose."""
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(low) if t.is_floating_point() else t for t in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(low)
    plain = query.dim() == 4 and not enable_gqa and query.dtype in FLOATS
    same = query.shape[-1] == key.shape[-1] == value.shape[-1]
    half = query.dtype in FLOATS_OF_16_BITS
    aten = torch.ops.aten
    if plain and same and half and attn_mask is None and query.shape[-1] <= 256:
        width = query.shape[-1]
        if width % 8:
            query, key, value = (F.pad(t, (0, -width % 8)) for t in (query, key, value))
        result = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        return result[0][..., :width]
    if plain and same and query.shape[-1] % (8 if half else 4) == 0:
        if attn_mask is not None:
            attn_mask = _prepared_mask(attn_mask, query, key)
        keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        result = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )
        return result[0]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _prepared_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as a bias of the scores, its rows padded as the kernel wants them, expanded."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    if mask.stride(-1) != 1 or any(stride % _MASK_ALIGNMENT for stride in mask.stride()[:-1]):
        width = mask.shape[-1]
        mask = F.pad(mask, (0, _MASK_ALIGNMENT - width % _MASK_ALIGNMENT))[..., :width]
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to
