"""The mask that compiled code makes from a few words: as rare as asked for, and independent."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.layers.autograd.traced_dropout import draw_words, dropped


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_share_of_what_is_dropped(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 100, 300) + 10
    result = dropped(x, probability, draw_words(x))
    gone = result == 0
    assert torch.equal(result, torch.where(gone, 0.0, x))
    assert abs(gone.double().mean().item() - probability) < 4 * (0.25 / x.numel()) ** 0.5


def test_elements_of_a_token_or_a_feature_are_independent() -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 400)
    gone = (dropped(x, 0.3, draw_words(x)) == 0).double()
    for mask in (gone, gone.t()):
        together = torch.corrcoef(mask.t()).fill_diagonal_(0)
        # correlations of independent columns spread by one over the root of how long they are
        assert together.std() < 1.05 / len(mask) ** 0.5
        assert together.abs().max() < 6 / len(mask) ** 0.5


def test_words_settle_the_mask_and_none_leaves_all() -> None:
    torch.manual_seed(0)
    x = torch.ones(20, 30)
    words = draw_words(x)
    first, second = (dropped(dtype, 0.5, words) for dtype in (x, x.bfloat16()))
    assert torch.equal(first, second.float())
    assert not torch.equal(first, dropped(x, 0.5, draw_words(x)))
    assert dropped(x, 0.5, None) is x
