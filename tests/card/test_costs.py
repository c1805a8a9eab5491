"""Every row of the cost table, and the speed of scores, in the branches that a card takes."""

from __future__ import annotations

import pytest

from spt_kernels.costs import ROWS, CostSetting
from spt_kernels.costs.measure import measure_row
from spt_kernels.costs.sensitivity_speed import EXACT, measure_sensitivity_speed

from .pretend import PEAK_BYTES, pretended_card

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48}
# its tensors are sparse, which those of the pretended card are not
NOT_PRETENDED = {"peft-shira"}
OTHER_DTYPES = ("bf16-autocast", "bf16")


def _setting(dtype: str, depth: int = 1) -> CostSetting:
    return CostSetting(
        model="vit_tiny_patch16_224",
        model_args=SIZES | {"depth": depth},
        batch_size=2,
        num_classes=5,
        dtype=dtype,
        device="cuda",
        rounds=1,
    )


CASES = [
    *((name, "fp32") for name in ROWS if name not in NOT_PRETENDED),
    *((name, dtype) for name in ("full", "spt-lora", "spt-adapter") for dtype in OTHER_DTYPES),
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_row(name: str, dtype: str) -> None:
    if name.startswith("peft"):
        pytest.importorskip("peft")
    with pretended_card():
        # an Adapter of rank 32 costs more than what a single block is given
        row = measure_row(name, _setting(dtype, 2 if name == "sensitive-adapter-32" else 1))
    assert row.note == ""
    assert row.step is not None
    assert row.inference is not None
    assert row.tuning_peak_bytes == PEAK_BYTES  # which the card, not an account, was asked for


def test_speed_of_scores() -> None:
    with pretended_card():
        speed = measure_sensitivity_speed(_setting("fp32"))
    assert speed.missing == {}
    assert speed.seconds(1, EXACT) > 0
