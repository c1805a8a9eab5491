"""Whether autocast is on, as torch tells it of every device but the GPU of a Mac."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.layers.autograd import autocast


@pytest.mark.parametrize("on_a_mac", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_is_found_on_and_left(kind: str, on_a_mac: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_a_mac:
        monkeypatch.setattr(autocast, "is_any_autocast_on", autocast._is_any_autocast_on)
    elif kind == "mps":
        pytest.skip("there is none elsewhere")
    device = torch.device(kind)
    assert not autocast.is_any_autocast_on()
    assert autocast.without_autocast(device) is autocast._AS_IT_IS
    torch.set_autocast_enabled(kind, True)
    try:
        assert autocast.is_any_autocast_on()
        assert autocast.without_autocast(device) is not autocast._AS_IT_IS
    finally:
        torch.set_autocast_enabled(kind, False)
