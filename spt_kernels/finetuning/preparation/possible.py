"""Whether a method can tune a model at all, found out before sensitivities are measured."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from ...methods import Method, make_plan, tune
from ...sensitivity import skewed_sensitivity
from ..job.given_plan import check_affords


def check_possible(method: Method, model: nn.Module) -> None:
    """Refuse, by made-up scores, before the long measuring what no scores would make possible."""
    # whether any module is worth its place depends on the scores
    whole = replace(method, name=method.name.removesuffix("-structured"))
    plan = make_plan(model, whole, skewed_sensitivity(model, head=method.head))
    if plan is not None and whole != method:
        check_affords(plan)
    tune(copy.deepcopy(model), whole, plan)
