"""The fingerprint of a base weight: tells the tensor that a task was trained on from any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.digest import digests_of
from ...model.quantized import logical_shape, quantization

# A tensor, and the positions at which it counts as if it held other values: both None, or [nnz]
Row = tuple[Tensor, Tensor | None, Tensor | None]


_QUANTIZED = "quantized to "


def dtype_name(dtype: torch.dtype, quantization: str) -> str:
    """What a fingerprint says of the dtype of a tensor, and of how it is quantized if it is."""
    return f"{_QUANTIZED}{quantization}" if quantization else str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Fingerprint:
    """Dtype, shape and a 128-bit hash of the exact bytes of one tensor.

    Attributes:
        dtype: such as `"float32"`; of what is quantized how, as `"quantized to nf4"`.
        shape: sizes of the tensor, or of the matrix that is packed in it.
        digest: 32 hex digits over the raw bytes in row-major order; see `digests_of`.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        """Fingerprint of a tensor on any device."""
        return cls.of_all({"": (tensor, None, None)})[""]

    @classmethod
    def of_all(cls, rows: Mapping[str, Row]) -> dict[str, Fingerprint]:
        """Fingerprints of many tensors, some of them at other values, in one pass over them."""
        columns = zip(*rows.values(), strict=True) if rows else ((), (), ())
        tensors, indices, originals = (list(column) for column in columns)
        digests = digests_of(tensors, indices, originals)
        return {
            name: cls(dtype_name(tensor.dtype, quantization(tensor)), logical_shape(tensor), digest)
            for name, tensor, digest in zip(rows, tensors, digests, strict=True)
        }

    @property
    def quantization(self) -> str:
        """What the tensor is quantized to; empty where it is not."""
        return self.dtype.removeprefix(_QUANTIZED) if self.dtype.startswith(_QUANTIZED) else ""

    def difference(self, other: Fingerprint) -> str | None:
        """What sets another tensor apart from this one, in words; None if nothing does."""
        if other.shape != self.shape:
            return f"expected shape {list(self.shape)}, got {list(other.shape)}"
        if other.dtype != self.dtype and (self.quantization or other.quantization):
            expected, got = (f.dtype if f.quantization else f"in {f.dtype}" for f in (self, other))
            return (
                f"expected weights {expected}, got weights {got}: a task belongs to the very "
                "weights that it was trained over; to put it on others of the same shapes on "
                "purpose, as on those that its base was quantized from, load it with "
                "check_base=False"
            )
        if other.dtype != self.dtype:
            return (
                f"expected {self.dtype} weights, got {other.dtype}: load the task in the dtype it "
                "was saved in, and convert the merged model afterwards"
            )
        if other.digest != self.digest:
            return f"the weights differ (expected fingerprint {self.digest}, got {other.digest})"
        return None

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        return {"dtype": self.dtype, "shape": list(self.shape), "digest": self.digest}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Fingerprint:
        """What `to_json` described; `ValueError` if it is something else."""
        if (
            not isinstance(document, dict)
            or sorted(document) != ["digest", "dtype", "shape"]
            or not isinstance(document["dtype"], str)
            or not isinstance(document["digest"], str)
            or not isinstance(document["shape"], list)
        ):
            raise ValueError(f"expected a fingerprint, got {document!r}")
        return cls(document["dtype"], tuple(document["shape"]), document["digest"])
