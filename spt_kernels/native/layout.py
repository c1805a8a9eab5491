"""What the C++ takes for granted of a tensor: dtype, device, layout, length."""

from __future__ import annotations

import torch
from torch import Tensor

# the numbers of DType in csrc/dtype.h
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int | None = None
) -> None:
    """Refuse what is no contiguous CPU tensor of `dtypes` with `numel` elements."""
    if tensor.dtype in dtypes and tensor.is_cpu and tensor.is_contiguous():
        if numel is None or tensor.numel() == numel:
            return
        raise ValueError(f"{name} must have {numel} elements, got {tensor.numel()}")
    raise ValueError(
        f"{name} must be a contiguous CPU tensor of {' or '.join(map(str, dtypes))}, got "
        f"{tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()}"
    )


def check_matrix(
    name: str, matrix: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_NUMBERS)
) -> None:
    """Refuse what is no CPU matrix with contiguous rows, which may be any distance apart."""
    fits = matrix.dim() == 2 and matrix.dtype in dtypes and matrix.is_cpu
    if fits and (matrix.stride(1) == 1 or matrix.shape[1] <= 1):
        return
    raise ValueError(
        f"{name} must be a CPU matrix of {' or '.join(map(str, dtypes))} with contiguous "
        f"rows, got {matrix.dtype} on {matrix.device} with shape {tuple(matrix.shape)} and strides "
        f"{matrix.stride()}"
    )


def check_samples(name: str, activation: Tensor, n_features: int) -> None:
    """Refuse what is no CPU `[samples, tokens, n_features]`; any strides will do."""
    fits = activation.dim() == 3 and activation.dtype in DTYPE_NUMBERS and activation.is_cpu
    if fits and activation.shape[2] == n_features:
        return
    raise ValueError(
        f"{name} must be a CPU tensor of {' or '.join(map(str, DTYPE_NUMBERS))} with shape "
        f"[samples, tokens, {n_features}], got {activation.dtype} on {activation.device} with "
        f"shape {tuple(activation.shape)}"
    )


def check_target(i: int, target: Tensor, index: Tensor, original: Tensor, nnz: int) -> None:
    """Refuse a weight, positions and base values that do not go together."""
    check(f"targets[{i}]", target, tuple(DTYPE_NUMBERS))
    check(f"indices[{i}]", index, (torch.int32,), nnz)
    check(f"originals[{i}]", original, (target.dtype,), nnz)
