"""The update of a LoRA in code for a compiler, against the plain formula and finite differences."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.layers.autograd.row_ranges import ranges_of
from spt_kernels.layers.autograd.traced_dropout import draw_words, dropped
from spt_kernels.layers.autograd.traced_lora import LoraTrace, TracedLora

RANK, FEATURES = 2, 5
ROWS = {
    "one": ((0, 6),),
    "thirds": ((0, 4), (4, 8), (8, 12)),
    "with a gap": ((2, 5), (7, 12)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_update_and_gradients(rows: tuple[tuple[int, int], ...], dropout: float) -> None:
    torch.manual_seed(0)
    ranges = ranges_of(RANK, rows)
    numbers = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(2, 3, FEATURES, **numbers)
    lora_a = torch.randn(RANK * len(rows), FEATURES, **numbers)
    lora_b = torch.randn(sum(stop - start for start, stop in rows), RANK, **numbers)
    words = draw_words(x) if dropout else None
    lora = LoraTrace(ranges, 0.7, dropout)

    update = TracedLora.apply(x, lora_a, lora_b, words, lora)
    kept = dropped(x, dropout, words) / (1 - dropout)
    expected = torch.zeros(2, 3, rows[-1][1], dtype=torch.float64)
    for features, own, part in ranges:
        expected[..., features] = 0.7 * kept @ lora_a[part].t() @ lora_b[own].t()
    torch.testing.assert_close(update, expected[..., rows[0][0] :].detach(), check_dtype=False)
    assert torch.autograd.gradcheck(
        lambda *tensors: TracedLora.apply(*tensors, words, lora), (x, lora_a, lora_b)
    )


def test_all_dropped_leaves_nothing() -> None:
    torch.manual_seed(0)
    x, lora_a, lora_b = torch.randn(3, 4), torch.randn(1, 4), torch.randn(6, 1)
    lora = LoraTrace(ranges_of(1, ((0, 6),)), 1.0, 1.0)
    assert TracedLora.apply(x, lora_a, lora_b, draw_words(x), lora).count_nonzero() == 0
