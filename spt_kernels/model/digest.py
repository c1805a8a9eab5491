"""Digests of parameters, a quantized one's of all the plain tensors that it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..ops.fingerprint import fingerprint
from .buffers import persistent_buffers
from .quantized import inner_tensors, is_quantized, quantization


def digests_of(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor | None] | None = None,
    originals: Sequence[Tensor | None] | None = None,
) -> list[str]:
    """`ops.fingerprint` of tensors that may be quantized, in the same one pass; 32 hex digits each.

    A quantized parameter's is over how it is quantized and over its inner tensors, so that weights
    quantized in two ways, or from two bases, are told apart without making floats of them.

    Args:
        tensors: as there, or quantized.
        indices: as there; None for what is quantized.
        originals: likewise.
    """
    plain: list[Tensor] = []
    rows: list[tuple[Tensor | None, Tensor | None]] = []
    parts = [inner_tensors(t) if is_quantized(t) else {"": t} for t in tensors]
    for m, part in enumerate(parts):
        plain += part.values()
        given = [None if column is None else column[m] for column in (indices, originals)]
        rows += [(given[0], given[1])] * len(part)
    found = iter(fingerprint(plain, [row[0] for row in rows], [row[1] for row in rows]))
    own = [[next(found) for _ in part] for part in parts]
    return [
        _joined(tensor, part, digests) if is_quantized(tensor) else digests[0]
        for tensor, part, digests in zip(tensors, parts, own, strict=True)
    ]


def digests_of_model(model: nn.Module) -> dict[str, str]:
    """Those of what a model computes with: its parameters, and floating buffers that it saves."""
    buffers = {n: b for n, b in persistent_buffers(model).items() if b is not None}
    named = dict(model.named_parameters()) | {
        name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()
    }
    return digests_by_name(named)


def digests_by_name(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Those of tensors, by their names; complex numbers of 128 bits are left out."""
    told = {name: tensor for name, tensor in named.items() if tensor.element_size() <= 8}
    return dict(zip(told, digests_of([*told.values()]), strict=True))


def _joined(tensor: Tensor, part: dict[str, Tensor], digests: list[str]) -> str:
    told = [quantization(tensor)]
    for (name, inner), digest in zip(part.items(), digests, strict=True):
        told.append(f"{name} {inner.dtype} {list(inner.shape)} {digest}")
    return hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()
