"""A captured step of ViT-B/16 beside PEFT LoRA-16's, captured by the same call, and beside itself.

Needs a card: on a CPU there are no graphs. At batch 8 an ordinary step takes as long as its host
does, and a graph as long as the card; at batch 64 what a graph saves is the gaps between kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spt_kernels.costs import CostSetting
from spt_kernels.costs.measure import tune_for_costs
from spt_kernels.costs.timing import make_batch
from spt_kernels.step import TrainingStep, capture_step

from .contest import hold, turn

OURS = ("spt-lora", "spt-unstructured")
PEER = "peft-lora-16"
TARGETS = {f"{PEER}, captured": 1.02}


def stepper(name: str, setting: CostSetting, captured: bool) -> Callable[[], object]:
    """A step on one batch again and again, its loss not waited for."""
    torch.manual_seed(0)
    plain = setting.build()
    shape, method = setting.image_shape(plain), setting.method(name, plain)
    tunable = tune_for_costs(plain.to(setting.device), method, shape)
    optimizer = tunable.optimizer(capturable=captured, fused=True)
    batch = make_batch(shape, setting.batch_size, setting)
    args: Any = (tunable.model.train(), F.cross_entropy, optimizer)
    step: Any
    if captured:
        step = capture_step(*args, batch, autocast=torch.bfloat16)
    else:
        step = TrainingStep(*args, autocast=torch.bfloat16)
    return lambda: step(*batch)


@pytest.mark.parametrize("batch", [8, 64])
def test_captured_step_vit_b(benchmark: Any, device: torch.device, batch: int) -> None:
    if device.type != "cuda":
        pytest.skip("no CUDA device")
    pytest.importorskip("peft")
    setting = CostSetting(batch_size=batch, dtype="bf16-autocast", device=str(device))
    contestants = {
        f"{name}, {'captured' if captured else 'ordinary'}": stepper(name, setting, captured)
        for captured in (True, False)
        for name in (*OURS, "full", PEER)
        if captured or name != "full"
    }
    contest = hold(
        benchmark,
        f"captured step: ViT-B/16, batch {batch}, bf16 autocast, 589,824 parameters and the head",
        contestants,
        rounds=15,
        targets=TARGETS,
    )
    turn(contest, "spt-unstructured, captured", TARGETS)
