"""What the tests of ops run on."""

from __future__ import annotations

import pytest

from spt_kernels import native


@pytest.fixture(
    params=[
        "reference",
        pytest.param(
            "native", marks=pytest.mark.skipif(not native.available(), reason="no C++ module")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors live; on a CPU with the C++ module or without."""
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: False)
    return "cuda" if request.param == "cuda" else "cpu"
