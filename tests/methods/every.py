"""Every method on a tiny ViT, small enough for it."""

from __future__ import annotations

import pytest
from torch import nn

from spt_kernels.methods import METHODS, Method, make_plan, tune
from spt_kernels.methods.tunable import Tunable
from spt_kernels.sensitivity import skewed_sensitivity

NAMES = tuple(name.replace("-K", "-2") for name in METHODS)
BASELINES = tuple(
    name for name, entry in zip(NAMES, METHODS.values(), strict=True) if entry.is_baseline
)


def method(name: str, budget: int = 1500) -> Method:
    """Skips what needs a library, or a version of one, that is not here."""
    if name.startswith("peft"):
        peft = pytest.importorskip("peft")
        if name == "peft-super-tuning" and not hasattr(peft, "SupertuningConfig"):
            pytest.skip(f"peft {peft.__version__} has no Super-Tuning")
    options = Method(name).entry.options
    rank = 2 if "rank" in options and name != "lora" else None
    short = {"supernet_epochs": 1, "generations": 1, "population": 2} if name == "noah" else {}
    return Method(name, budget if "budget" in options else None, rank, **short)


def tuned(name: str, model: nn.Module) -> Tunable:
    """By made-up scores, where the method chooses."""
    chosen = method(name)
    scores = skewed_sensitivity(model) if chosen.is_sensitivity_aware else None
    return tune(model, chosen, make_plan(model, chosen, scores))
