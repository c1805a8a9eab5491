"""The fingerprint of a base weight: tells the tensor that a task was trained on from any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...ops.fingerprint import fingerprint

# A tensor, and the positions at which it counts as if it held other values: both None, or [nnz]
Row = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Fingerprint:
    """Dtype, shape and a 128-bit hash of the exact bytes of one tensor.

    Attributes:
        dtype: such as `"float32"`.
        shape: sizes of the tensor.
        digest: 32 hex digits over the raw bytes in row-major order; see `ops.fingerprint`.
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
        digests = fingerprint(tensors, indices, originals)
        return {
            name: cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest)
            for name, tensor, digest in zip(rows, tensors, digests, strict=True)
        }

    def difference(self, other: Fingerprint) -> str | None:
        """What sets another tensor apart from this one, in words; None if nothing does."""
        if other.shape != self.shape:
            return f"expected shape {list(self.shape)}, got {list(other.shape)}"
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
