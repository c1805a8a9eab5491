"""The fingerprint of a base weight: tells the tensor that a task was trained on from any other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .container import bytes_of


@dataclass(frozen=True)
class Fingerprint:
    """Dtype, shape and BLAKE2b-128 of the exact bytes of one tensor.

    Attributes:
        dtype: such as `"float32"`.
        shape: sizes of the tensor.
        digest: 32 hex digits over dtype, shape and raw bytes in row-major order.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        """Fingerprint of a tensor on any device."""
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        digest = hashlib.blake2b(f"{dtype}{list(shape)}".encode(), digest_size=16)
        digest.update(bytes_of(tensor))
        return cls(dtype, shape, digest.hexdigest())

    def difference(self, tensor: Tensor) -> str | None:
        """What sets `tensor` apart from the fingerprinted one, in words; None if nothing does."""
        other = Fingerprint.of(tensor)
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
