"""One whole training step of ViT-B/16, optimizer included, beside full tuning and its peers.

Every row but full tuning trains the number of parameters that a LoRA of rank 16 on `qkv` has,
0.69 % of the backbone, the share of the paper's Table 7; the rows are those of the cost table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spt_kernels.costs import CostSetting
from spt_kernels.costs.measure import make_step
from spt_kernels.costs.peers import PEERS
from spt_kernels.costs.prepared import budget_of
from spt_kernels.costs.ways import WAYS

from .contest import hold, turn

BATCH = 8
OURS = ("spt-lora", "spt-unstructured")
TARGETS = {"full": 0.75, "peft-lora-16": 1.0}


def stepper(way: str, setting: CostSetting) -> Callable[[], object]:
    torch.manual_seed(0)
    model = setting.build()
    shape, budget = setting.image_shape(model), budget_of(model)
    prepared = WAYS[way](model.to(setting.device), setting)
    # the rows are only comparable then
    assert way == "full" or abs(prepared.trained - budget) <= 0.01 * budget, prepared.trained
    return make_step(prepared, shape, BATCH, setting)


def peers(setting: CostSetting) -> dict[str, Callable[[], object]]:
    """Whatever is installed and can train as many parameters."""
    found = {}
    for way in PEERS:
        try:
            found[way] = stepper(way, setting)
        except ValueError as reason:
            print(f"{way}: left out, {reason}")
    return found


def test_training_step_vit_b(benchmark: Any, device: torch.device) -> None:
    setting = CostSetting(device=str(device))
    contestants = {way: stepper(way, setting) for way in (*OURS, "full")} | peers(setting)
    contest = hold(
        benchmark,
        f"training step: ViT-B/16, batch {BATCH}, fp32, 589,824 parameters and the head",
        contestants,
        rounds=5,
        targets=TARGETS,
    )
    turn(contest, "spt-unstructured", TARGETS)
