"""The kernel of `fingerprint`, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import fingerprint as kernels
from spt_kernels.reference import fingerprint as reference

from ...ops.test_fingerprint import DTYPES, random, some_index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    tensors = [random(n, dtype, seed=n) for n in (0, 1, 64, 513, 2000)]
    indices = [some_index(len(tensor)) for tensor in tensors]
    originals = [random(len(index), dtype, seed=3) for index in indices]
    found = kernels.fingerprint(tensors, indices, originals)
    assert torch.equal(found, reference.fingerprint(tensors, indices, originals))


def test_one_that_is_not_aligned() -> None:
    view = random(101, torch.float32)[1:]
    nothing = torch.empty(0, dtype=torch.int32)
    found = kernels.fingerprint([view], [nothing], [view[:0]])
    assert torch.equal(found, reference.fingerprint([view], [nothing], [view[:0]]))
