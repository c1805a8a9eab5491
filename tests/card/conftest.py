"""A pretended card's products are a CPU's, but not oneDNN's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def without_onednn() -> Iterator[None]:
    """A card multiplies batches that lie one within another; there oneDNN fails, and stays off."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)
