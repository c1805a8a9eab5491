"""The op that adds each sample's squared gradient to a sensitivity score (the paper's Algorithm 1).

The gradients of a batch's samples are never in memory all together. In 16 bits on a card a tile of
one sample's gradient is computed, squared and summed over the samples before the score is written;
in fp32 torch multiplies, as exactly as it is asked to, some samples at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..reference import squared_grad as reference
from .dtypes import FLOATS
from .launching import mark_mutated, on_card, register


def accumulate_squared_grad(
    score: Tensor, grad_output: Tensor, input: Tensor, scale: float = 1.0
) -> None:
    """`score[o, i] += Σ_b (scale · Σ_t grad_output[b, t, o] · input[b, t, i])²`.

    The products are summed in fp32 and in a fixed order: the same bits in every run.

    Args:
        score: `[out, in]` fp32, any strides; mutated.
        grad_output: `[samples, tokens, out]`, fp32, bf16 or fp16; any strides, without a copy.
        input: `[samples, tokens, in]`, the dtype of `grad_output`; any strides.
        scale: factor on each sample's gradient before it is squared: the number of samples that
            the loss was averaged over, say.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape or a device does not fit.
    """
    _require_score(score, 2)
    _require_activation("grad_output", grad_output, score)
    _require_activation("input", input, score)
    if input.dtype != grad_output.dtype:
        raise TypeError(
            f"input: expected {grad_output.dtype}, the dtype of grad_output, got {input.dtype}"
        )
    samples, tokens = grad_output.shape[:2]
    n_out, n_in = score.shape
    _require_shape("grad_output", grad_output, (samples, tokens, n_out))
    _require_shape("input", input, (samples, tokens, n_in))
    torch.ops.spt.accumulate_squared_grad(score, grad_output, input, scale)


def accumulate_squared_vector_grad(
    score: Tensor,
    grad_output: Tensor,
    input: Tensor | None,
    scale: float = 1.0,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bias_score: Tensor | None = None,
) -> None:
    """`score[c] += Σ_b (scale · Σ_t grad_output[b, t, c] · x[b, t, c])²`, x the input normalized.

    This is the squared gradient of a bias (`input` is None, standing for ones) and of a norm's
    weight, with that of the norm's bias besides, from one look at what they have in common.

    Args:
        score: `[channels]` fp32, or `[rows, channels]`, of which sample b is added to row b mod
            rows: their sum is the score, and a card can work on all at once. Mutated.
        grad_output: `[samples, tokens, channels]`, fp32, bf16 or fp16; any strides.
        input: `[samples, tokens, channels]`, fp32, bf16 or fp16, or None; any strides.
        scale: factor on each sample's gradient before it is squared.
        mean: fp32 `[samples, tokens]`, what to subtract of the input, or None.
        rstd: fp32 `[samples, tokens]`, what to multiply it by then; with `mean`.
        bias_score: of a bias that is added to the same, in the shape of `score`; mutated.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape or a device does not fit.
    """
    _require_score(score, 2 if score.dim() == 2 else 1)
    if score.dim() == 2 and not score.is_contiguous():
        raise ValueError(f"score: expected contiguous rows, got strides {score.stride()}")
    _require_activation("grad_output", grad_output, score)
    _require_shape("grad_output", grad_output, (*grad_output.shape[:2], score.shape[-1]))
    if input is not None:
        _require_activation("input", input, score)
        _require_shape("input", input, tuple(grad_output.shape))
    if (mean is None) != (rstd is None) or (mean is not None and input is None):
        raise ValueError("mean, rstd: expected both of them, and an input, or neither")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic is not None:
            _require_fp32(name, statistic, score)
            _require_shape(name, statistic, tuple(grad_output.shape[:2]))
    if bias_score is not None:
        _require_score(bias_score, score.dim(), "bias_score")
        _require_shape("bias_score", bias_score, tuple(score.shape))
        if score.dim() == 2 and not bias_score.is_contiguous():
            raise ValueError(f"bias_score: expected contiguous rows, got {bias_score.stride()}")
    torch.ops.spt.accumulate_squared_vector_grad(
        score, grad_output, input, scale, mean, rstd, bias_score
    )


def launch_matrix(score: Tensor, grad_output: Tensor, input: Tensor, scale: float) -> None:
    """`accumulate_squared_grad` of what is known to fit, on a CPU or a card."""
    (_matrix_cpu if score.is_cpu else _matrix_cuda)(score, grad_output, input, scale)


def launch_vector(
    score: Tensor,
    grad_output: Tensor,
    input: Tensor | None,
    scale: float,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bias_score: Tensor | None = None,
) -> None:
    """`accumulate_squared_vector_grad` of what is known to fit, on a CPU or a card."""
    launch = _vector_cpu if score.is_cpu else _vector_cuda
    launch(score, grad_output, input, scale, mean, rstd, bias_score)


def _require_score(score: Tensor, ndim: int, name: str = "score") -> None:
    if score.dtype != torch.float32:
        raise TypeError(f"{name}: expected torch.float32, got {score.dtype}")
    if score.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(score.shape)}")
    if score.requires_grad:
        raise ValueError(f"{name}: expected a tensor that needs no gradient, got one that does")


def _require_fp32(name: str, tensor: Tensor, score: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    if tensor.device != score.device:
        raise ValueError(
            f"{name}: expected device {score.device}, where score is, got {tensor.device}"
        )


def _require_activation(name: str, tensor: Tensor, score: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
    if tensor.device != score.device:
        raise ValueError(
            f"{name}: expected device {score.device}, where score is, got {tensor.device}"
        )
    if tensor.dim() != 3:
        raise ValueError(
            f"{name}: expected [samples, tokens, features], got shape {tuple(tensor.shape)}"
        )


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


torch.library.define(
    "spt::accumulate_squared_grad",
    "(Tensor(a!) score, Tensor grad_output, Tensor input, float scale) -> ()",
)
torch.library.define(
    "spt::accumulate_squared_vector_grad",
    "(Tensor(a!) score, Tensor grad_output, Tensor? input, float scale, Tensor? mean=None, "
    "Tensor? rstd=None, Tensor(b!)? bias_score=None) -> ()",
)


def _matrix_cpu(score: Tensor, grad_output: Tensor, input: Tensor, scale: float) -> None:
    if not native.available():
        reference.accumulate_squared_grad(score, grad_output, input, scale)
    elif score.stride(1) == 1 or score.shape[1] <= 1:
        native.accumulate_squared_grad(score, grad_output, input, scale)
    elif score.stride(0) == 1 or score.shape[0] <= 1:
        native.accumulate_squared_grad(score.T, input, grad_output, scale)
    else:
        dense = score.contiguous()
        native.accumulate_squared_grad(dense, grad_output, input, scale)
        score.copy_(dense)
    mark_mutated((score,))


_vector_cpu = reference.accumulate_squared_vector_grad


def _matrix_cuda(score: Tensor, grad_output: Tensor, input: Tensor, scale: float) -> None:
    from ..kernels import squared_grad as kernels

    with on_card(score.device):
        kernels.accumulate_squared_grad(score, grad_output, input, scale)
    mark_mutated((score,))


def _vector_cuda(
    score: Tensor,
    grad_output: Tensor,
    input: Tensor | None,
    scale: float,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bias_score: Tensor | None = None,
) -> None:
    from ..kernels.squared_vector_grad import accumulate_squared_vector_grad as launch

    with on_card(score.device):
        launch(score, grad_output, input, scale, mean, rstd, bias_score)
    mark_mutated((score,) if bias_score is None else (score, bias_score))


_KERNELS = {
    "spt::accumulate_squared_grad": (_matrix_cpu, _matrix_cuda),
    "spt::accumulate_squared_vector_grad": (_vector_cpu, _vector_cuda),
}
for _op, (_cpu, _cuda) in _KERNELS.items():
    register(_op, "cpu", _cpu)
    register(_op, "cuda", _cuda)
    torch.library.register_fake(_op, lambda *arguments: None)
