"""What a plan or sensitivity from a file decides, and that nothing said beside contradicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..methods import Method, entry_of
from ..methods.method import name_of
from ..plan import Plan, module_cost
from ..plan.table import KINDS
from ..sensitivity import Sensitivity


def load_plan(path: str | Path) -> Plan:
    """Read a plan; `ValueError` if there is no such file, and as `Plan.load`."""
    if not Path(path).is_file():
        raise ValueError(f"plan: no such file: {path}")
    return Plan.load(path)


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read a sensitivity; `ValueError` if there is no such file, and as `Sensitivity.load`."""
    if not Path(path).is_file():
        raise ValueError(f"sensitivity: no such file: {path}")
    return Sensitivity.load(path)


def method_of(plan: Plan, name: str | None = None) -> Method:
    """The method that made `plan`, with the options it was made with.

    Args:
        plan: of any method that takes one.
        name: what it is called, where that is known.
    """
    name = name or name_of(plan)
    options = _options_of(plan)
    known = {option: options[option] for option in entry_of(name).options & options.keys()}
    return Method(name, **known)


def check_agrees(plan: Plan, name: str | None, given: Mapping[str, Any]) -> None:
    """Refuse what contradicts a plan; values that are the plan's own are fine.

    Args:
        plan: what is to be trained.
        name: of the method, if one was named.
        given: the fields of `Method` that were asked for beside the plan.

    Raises:
        ValueError: the method does not make such plans, or an option is not the plan's.
    """
    if name is not None and not entry_of(name).may_make(plan):
        kind = plan.kind or "unstructured"
        raise ValueError(
            f"plan: expected one of method {name!r}, got {kind}; without `method` it is "
            f"{name_of(plan)!r}"
        )
    options = _options_of(plan)
    for option, value in given.items():
        own, asked = options.get(option), value
        if option == "budget" and isinstance(value, float):
            asked = int(value * plan.backbone_numel)
        if asked != own:
            has = "none" if own is None else f"{own:,}" if isinstance(own, int) else own
            raise ValueError(
                f"{option}: the plan decides, and has {has}, got {value}; leave it out, or make "
                "another plan"
            )


def check_affords(plan: Plan) -> None:
    """Refuse a budget that is below what the smallest LoRA or Adapter on any matrix costs."""
    module = KINDS[plan.kind or "lora"]
    costs = [
        module_cost(plan.kind or "lora", plan.rank, info.shape[1], block.stop - block.start)
        for info in plan.info.values()
        if info.takes_modules
        for block in info.row_blocks
    ]
    if not costs:
        raise ValueError(f"method: the model has no matrix to put {module} on")
    if plan.budget < min(costs):
        raise ValueError(
            f"budget: the smallest {module} of rank {plan.rank} costs {min(costs):,}, got "
            f"{plan.budget:,}: a larger budget or a smaller rank"
        )


def check_samples(measured_on: int, samples: int) -> None:
    """Refuse a number of samples that is not that of a sensitivity from a file."""
    if samples != measured_on:
        raise ValueError(
            f"samples: the sensitivity was measured on {measured_on}, got {samples}; leave it "
            "out, or measure anew"
        )


def said_of(method: Method) -> dict[str, Any]:
    """The options of a method that are not the defaults."""
    values = {f.name: getattr(method, f.name) for f in fields(Method) if f.name != "name"}
    return {name: value for name, value in values.items() if value != getattr(Method, name)}


def _options_of(plan: Plan) -> dict[str, Any]:
    """The fields of `Method` that a plan tells; one that it does not know is not among them."""
    spec = next(iter(plan.structured.values()), None)
    options: dict[str, Any] = {"budget": plan.budget, "rule": plan.rule}
    if plan.kind is not None or spec is not None:
        options["rank"] = plan.rank if spec is None else spec.rank
        options["scale"] = getattr(spec, "scale", plan.scale)
        options["dropout"] = getattr(spec, "dropout", plan.dropout)
    if plan.head or plan.head_source:
        options["head"] = plan.head
    if plan.num_samples:
        options["samples"] = plan.num_samples
    return options
