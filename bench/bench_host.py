"""What a training step costs besides its arithmetic: twelve blocks so narrow that none is left.

A fast card is done with a layer before Python has asked for the next one: there the step takes as
long as its host does. Here the products are of width 48, and one thread runs all: what is timed is
Python, autograd and the dispatcher. Ours train entries of all 48 matrices, or a LoRA instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spt_kernels import Sensitivity
from spt_kernels.costs import CostSetting
from spt_kernels.costs.measure import make_step
from spt_kernels.finetuning.demo import one_thread
from spt_kernels.methods import Method, make_plan, tune
from spt_kernels.model import candidate_names

from .contest import hold, turn
from .operators import count_operators

BATCH = 2
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 3}
SETTING = CostSetting(model="vit_tiny_patch16_224", model_args=SHAPE, num_classes=10)
BUDGET = 9216  # of the LoRA of rank 4 on q, k, v
METHODS = (
    Method("spt-lora", BUDGET, 1, dropout=0.0),  # as PEFT's
    Method("spt-unstructured", BUDGET),
    Method("full"),
    Method("peft-lora-4"),
    Method("peft-lora-all", 22_272),  # of rank 4 as well
)
TARGETS = {"peft-lora-4": 1.15}


def stepper(method: Method) -> Callable[[], object]:
    torch.manual_seed(0)
    model = SETTING.build()
    scores = sensitivity_everywhere(model) if method.is_sensitivity_aware else None
    tunable = tune(model, method, make_plan(model, method, scores))
    return make_step(tunable, SETTING.image_shape(model), BATCH, SETTING)


def sensitivity_everywhere(model: nn.Module) -> Sensitivity:
    """Scores of which every matrix of the blocks has high ones, every second one more of them."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    names = [
        name for name in candidate_names(model) if re.match(r"blocks\..*\.(attn|mlp).*weight", name)
    ]
    scores = {
        name: (1 + n % 2) * torch.randn(parameters[name].shape, generator=generator).square()
        for n, name in enumerate(names)
    }
    return Sensitivity.from_tensors(scores, num_samples=1)


@one_thread()
def test_host_of_a_training_step(benchmark: Any) -> None:
    steps = {}
    for method in METHODS:
        try:
            steps[method.name] = stepper(method)
        except ValueError as reason:
            print(f"{method.name}: left out, {reason}")
    operators = {f"operators, {name}": count_operators(step) for name, step in steps.items()}
    contest = hold(
        benchmark,
        f"host of a step: ViT, 12 blocks of width 48, batch {BATCH}, one thread",
        steps,
        rounds=200,  # machines change their speed for seconds at a time
        targets=TARGETS,
        facts=operators,
    )
    turn(contest, "spt-unstructured", TARGETS)
