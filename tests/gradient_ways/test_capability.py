"""A card is taken for one of those that kernels are made for, or the last before it."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.gradient_ways.capability import CAPABILITIES, capability_of
from spt_kernels.gradient_ways.gradient_cost import RATES


@pytest.mark.parametrize(
    ("capability", "taken_for"),
    [
        ((7, 5), 80),
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 90),
        ((12, 0), 86),  # 99 KB of shared memory, not 227
    ],
    ids=lambda value: str(value),
)
def test_an_unlisted_card_is_taken_for_the_one_before(
    capability: tuple[int, int], taken_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert capability_of(torch.device("cuda")) == taken_for
    assert taken_for in CAPABILITIES
    assert taken_for in RATES
