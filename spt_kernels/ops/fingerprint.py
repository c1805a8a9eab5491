"""Fingerprint: a 128-bit hash of the exact bytes of many tensors, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..reference import fingerprint as reference
from .launching import register

torch.library.define(
    "spt::fingerprint", "(Tensor[] tensors, Tensor[] indices, Tensor[] originals) -> Tensor"
)


def fingerprint(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor | None] | None = None,
    originals: Sequence[Tensor | None] | None = None,
) -> list[str]:
    """Hash the bytes of each tensor, in row-major order, to 32 hex digits.

    Every backend gives the same digits, on every device. A changed element is always noticed when
    it is the only one, and otherwise but by a chance of 2⁻¹²⁸ or so. It guards against accidents;
    who wants to can make two tensors with the same fingerprint.

    Args:
        tensors: of any dtype of 1, 2, 4 or 8 bytes, on any devices. A tensor that is not contiguous
            is copied.
        indices: for each tensor None or int32 `[nnz]`: sorted, unique flat positions of elements
            that count as if they were those of `originals`. The tensor is not changed.
        originals: for each tensor None or `[nnz]` in its dtype.

    Returns:
        For each tensor 32 hex digits. Dtype and shape are not in them.

    Raises:
        ValueError: lengths, shapes or devices do not fit.
        TypeError: a dtype does not fit.
    """
    n = len(tensors)
    some_indices = [None] * n if indices is None else list(indices)
    some_originals = [None] * n if originals is None else list(originals)
    for name, column in (("indices", some_indices), ("originals", some_originals)):
        if len(column) != n:
            raise ValueError(f"{name} has {len(column)} items, expected {n}, one per tensor")
    columns = zip(tensors, some_indices, some_originals, strict=True)
    rows = [_checked(m, *row) for m, row in enumerate(columns)]
    digits = [""] * n
    for device in dict.fromkeys(row[0].device for row in rows):
        chosen = [m for m, row in enumerate(rows) if row[0].device == device]
        some = [[rows[m][i] for m in chosen] for i in range(3)]
        if device.type not in ("cpu", "cuda"):
            some = [[tensor.cpu() for tensor in column] for column in some]
        with torch.no_grad():
            found = torch.ops.spt.fingerprint(*some)  # int64 [tensors, 2]
        for m, (first, second) in zip(chosen, found.tolist(), strict=True):
            digits[m] = f"{first % 2**64:016x}{second % 2**64:016x}"
    return digits


def _checked(
    m: int, tensor: Tensor, index: Tensor | None, original: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if tensor.element_size() > 8:
        raise TypeError(f"tensors[{m}] must have elements of at most 8 bytes, got {tensor.dtype}")
    if (index is None) != (original is None):
        raise ValueError(f"indices[{m}] and originals[{m}] must be given together")
    tensor = tensor.detach().contiguous()
    if index is None or original is None:
        return tensor, tensor.new_empty(0, dtype=torch.int32), tensor.new_empty(0)
    if index.dtype != torch.int32 or original.dtype != tensor.dtype:
        raise TypeError(
            f"indices[{m}] must be torch.int32 and originals[{m}] {tensor.dtype}, got "
            f"{index.dtype} and {original.dtype}"
        )
    if index.dim() != 1 or original.shape != index.shape:
        raise ValueError(
            f"indices[{m}] and originals[{m}] must be vectors of one length, got shapes "
            f"{tuple(index.shape)} and {tuple(original.shape)}"
        )
    if index.device != tensor.device or original.device != tensor.device:
        raise ValueError(
            f"indices[{m}] and originals[{m}] must be on {tensor.device}, got {index.device} and "
            f"{original.device}"
        )
    return tensor, index.contiguous(), original.detach().contiguous()


def _cpu(tensors: list[Tensor], indices: list[Tensor], originals: list[Tensor]) -> Tensor:
    backend = native if native.available() else reference
    return backend.fingerprint(tensors, indices, originals)


def _cuda(tensors: list[Tensor], indices: list[Tensor], originals: list[Tensor]) -> Tensor:
    from ..kernels import fingerprint as kernels

    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        return kernels.fingerprint(tensors, indices, originals)


register("spt::fingerprint", "cpu", _cpu)
register("spt::fingerprint", "cuda", _cuda)


@torch.library.register_fake("spt::fingerprint")
def _fake(tensors: list[Tensor], indices: list[Tensor], originals: list[Tensor]) -> Tensor:
    return torch.empty(len(tensors), 2, dtype=torch.int64, device=tensors[0].device)
