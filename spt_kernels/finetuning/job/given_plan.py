"""What a plan or sensitivity from a file decides, and that nothing said beside contradicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...methods import Method, entry_of
from ...methods.method import name_of
from ...plan import Plan, module_cost
from ...plan.blocks import block_named
from ...plan.table import KINDS
from ...sensitivity import Sensitivity
from ..folder.run_folder import RunFolder


def load_plan(path: str | Path) -> Plan:
    """Read a plan; `ValueError` if there is no such file, and as `Plan.load`."""
    _check_is_file("plan", path)
    return Plan.load(path)


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read a sensitivity; `ValueError` if there is no such file, and as `Sensitivity.load`."""
    _check_is_file("sensitivity", path)
    return Sensitivity.load(path)


def _check_is_file(what: str, path: str | Path) -> None:
    if Path(path).is_dir():
        raise ValueError(f"{what}: expected a file, got the folder {path}")
    if not Path(path).is_file():
        raise ValueError(f"{what}: no such file: {path}")


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


class GivenJob(Protocol):
    """What the jobs of runs on images and on scenes have in common here."""

    @property
    def method(self) -> Method:
        """What is trained."""

    @property
    def sensitivity(self) -> str | None:
        """A file of it."""

    @property
    def plan(self) -> str | None:
        """Likewise."""


J = TypeVar("J", bound=GivenJob)


def settled(
    job: J, folder: RunFolder, *, resume: bool
) -> tuple[J, Plan | None, Sensitivity | None]:
    """The job, its method as the plan or sensitivity in a file has it, and what was in the file.

    Args:
        job: what is to be run.
        folder: where. A run that is resumed has a plan of its own there, and does without what that
            was made of.
        resume: whether it is.

    Raises:
        ValueError: there is no such file, or the method contradicts what is in it.
        DeltaFormatError: it is damaged.
    """
    method = job.method
    plan = Plan.load(folder["plan"]) if resume and folder["plan"].is_file() else None
    if job.plan is not None:
        plan = plan or load_plan(job.plan)
        check_agrees(plan, method.name, said_of(method))
        return _with(job, method_of(plan, method.name)), plan, None
    if job.sensitivity is None:
        return job, plan, None
    given = load_sensitivity(job.sensitivity) if plan is None else None
    measured_on = (given or plan).num_samples  # type: ignore[union-attr]
    if method.samples != Method.samples:
        check_samples(measured_on, method.samples)
    return _with(job, replace(method, samples=measured_on)), plan, given


def _with(job: J, method: Method) -> J:
    return replace(job, method=method)  # type: ignore[type-var]


def check_given(job: GivenJob) -> None:
    """Refuse a plan or a sensitivity that the job's method does not use; `ValueError`."""
    if job.plan is not None and job.method.entry.holds is None:
        raise ValueError(f"plan: method {job.method.name!r} does not use one")
    if job.sensitivity is not None and not job.method.is_sensitivity_aware:
        raise ValueError(f"sensitivity: method {job.method.name!r} does not use one")
    if job.plan is not None and job.sensitivity is not None:
        raise ValueError("sensitivity: the plan was made of one already; leave it out")


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
        if option == "from_block" and own is not None:
            asked = block_named(plan.info, value)
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
    if plan.from_block:
        options["from_block"] = plan.from_block
    if plan.num_samples:
        options["samples"] = plan.num_samples
    return options
