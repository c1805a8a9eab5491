"""Keys for a graph are those of the seeds that a loop would have drawn."""

from __future__ import annotations

import torch

from spt_kernels.layers.autograd.mask_keys import MaskKeys, draw_seed
from spt_kernels.ops.dropout import key_of


def test_seeds_of_a_replay_are_those_of_a_loop() -> None:
    torch.manual_seed(4)
    expected = [draw_seed() for _ in range(6)]
    torch.manual_seed(4)
    keys = MaskKeys(torch.device("cpu"))
    with keys.in_use():
        assert [draw_seed() for _ in range(3)] == expected[:3]  # it counts them
    keys.allocate()
    keys.refill()
    with keys.in_use():
        found = [draw_seed() for _ in range(3)]
    assert [tuple(key.tolist()) for key in found] == [key_of(seed) for seed in expected[3:]]
    after = torch.get_rng_state()
    torch.manual_seed(4)
    for _ in range(6):
        draw_seed()
    assert torch.equal(torch.get_rng_state(), after)


def test_a_refill_changes_what_was_handed_out() -> None:
    keys = MaskKeys(torch.device("cpu"))
    with keys.in_use():
        draw_seed()
    keys.allocate()
    keys.refill()
    with keys.in_use():
        key = draw_seed()
    assert isinstance(key, torch.Tensor)
    before = key.clone()
    keys.refill()
    assert not torch.equal(key, before)


def test_outside_seeds_are_numbers_and_without_masks_nothing_is_drawn() -> None:
    keys = MaskKeys(torch.device("cpu"))
    with keys.in_use():
        pass
    keys.allocate()
    before = torch.get_rng_state()
    keys.refill()
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(draw_seed(), int)
