"""One whole training step of ViT-B/16, optimizer included, beside full tuning and its peers.

Every row but full tuning trains the number of parameters that a LoRA of rank 16 on `qkv` has,
0.69 % of the backbone, the share of the paper's Table 7; the rows are those of the cost table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spt_kernels.costs import ROWS, CostSetting
from spt_kernels.costs.measure import make_step, tune_for_costs
from spt_kernels.costs.setting import budget_of

from .contest import hold, turn

BATCH = 8
OURS = ("spt-lora", "spt-unstructured")
TARGETS = {"full": 0.75, "peft-lora-16": 1.0}


def stepper(name: str, setting: CostSetting) -> Callable[[], object]:
    torch.manual_seed(0)
    model = setting.build()
    shape, budget = setting.image_shape(model), budget_of(model)
    tunable = tune_for_costs(model.to(setting.device), setting.method(name, model), shape)
    # the rows are only comparable then
    assert name == "full" or abs(tunable.trained - budget) <= 0.01 * budget, tunable.trained
    return make_step(tunable, shape, BATCH, setting)


def peers(setting: CostSetting) -> dict[str, Callable[[], object]]:
    """Whatever is installed and can train as many parameters."""
    found = {}
    for name in ROWS:
        if name.startswith("peft-"):
            try:
                found[name] = stepper(name, setting)
            except ValueError as reason:
                print(f"{name}: left out, {reason}")
    return found


def test_training_step_vit_b(benchmark: Any, device: torch.device) -> None:
    setting = CostSetting(device=str(device))
    contestants = {name: stepper(name, setting) for name in (*OURS, "full")} | peers(setting)
    contest = hold(
        benchmark,
        f"training step: ViT-B/16, batch {BATCH}, fp32, 589,824 parameters and the head",
        contestants,
        rounds=5,
        targets=TARGETS,
    )
    turn(contest, "spt-unstructured", TARGETS)
