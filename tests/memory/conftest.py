"""What tests that hold an account against a real step have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def own_kernels() -> Iterator[None]:
    """torch's own kernels: what oneDNN's hold depends on the CPU, up to a fifth."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # the switch sets that one as well
        with torch.backends.mkldnn.flags(enabled=False):
            yield
