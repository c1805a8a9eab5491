"""What each method trains: a `Plan` for all but full fine-tuning."""

from __future__ import annotations

import torch
from torch import nn

from .allocation import LoraSpec, Plan, allocate
from .anatomy import ParameterInfo, candidate_names, describe, head_names
from .method import DEFAULT_BUDGET, DEFAULT_RANK, Method
from .sensitivity import Sensitivity
from .tuning import apply


def make_plan(
    model: nn.Module, method: Method, sensitivity: Sensitivity | None = None
) -> Plan | None:
    """Decide what `method` trains of `model`; `None` means every parameter.

    Args:
        model: the plain base model, which is not changed.
        method: which one, and its budget.
        sensitivity: needed by the `spt-*` methods.

    Raises:
        ValueError: the budget is too small, or more than there is, or no sensitivity was given.
    """
    if method.name == "full":
        return None
    if method.is_sensitivity_aware:
        if sensitivity is None:
            raise ValueError(f"sensitivity: method {method.name!r} needs one")
        return allocate(
            sensitivity,
            DEFAULT_BUDGET if method.budget is None else method.budget,
            structured=method.structured,
            rank=method.rank or DEFAULT_RANK,
            rule=method.rule,
            scale=method.scale,
            dropout=method.dropout,
        )
    if method.name == "lora":
        return plan_uniform_lora(model, method)
    if method.name == "bias":
        return plan_biases(model)
    return _plan(model, {}, {})


def prepare(model: nn.Module, plan: Plan | None) -> nn.Module:
    """Make `model`, in place, train what `plan` says, or every parameter if that is `None`."""
    if plan is not None:
        return apply(model, plan)
    return model.requires_grad_(True)


def plan_uniform_lora(model: nn.Module, method: Method) -> Plan:
    """LoRA of one rank on the query and value matrices of every attention (Hu et al., 2021).

    A model without attention gets it on every linear matrix of its blocks. Without a rank in
    `method`, it is the largest one that fits the budget.
    """
    info = _candidates(model)
    rows = _lora_rows(info)
    cost = sum(
        LoraSpec.cost(1, info[name].shape[1], stop - start)
        for name, ranges in rows.items()
        for start, stop in ranges
    )
    budget = count_of(method.budget, backbone_numel(model))
    rank = method.rank
    if rank is None and method.budget is None:
        rank = DEFAULT_RANK
    if rank is None:
        rank = budget // cost
        if rank < 1:
            raise ValueError(f"budget: LoRA of rank 1 on q and v costs {cost:,}, got {budget:,}")
    elif method.budget is not None and rank * cost > budget:
        raise ValueError(f"budget: LoRA of rank {rank} costs {rank * cost:,}, got {budget:,}")
    structured = {
        name: LoraSpec(rank, ranges, info[name].shape[1], method.scale, method.dropout)
        for name, ranges in rows.items()
    }
    return _plan(model, {}, structured)


def plan_biases(model: nn.Module) -> Plan:
    """Every bias of the backbone, those of norms among them (BitFit, Zaken et al., 2021)."""
    unstructured = {
        name: torch.arange(what.numel)
        for name, what in _candidates(model).items()
        if what.kind in ("bias", "norm") and name.endswith("bias")
    }
    if not unstructured:
        raise ValueError(f"method: {type(model).__name__} has no biases to train")
    return _plan(model, unstructured, {})


def backbone_numel(model: nn.Module) -> int:
    """Parameters of `model` without its head."""
    head = set(head_names(model))
    return sum(p.numel() for name, p in model.named_parameters() if name not in head)


def count_of(budget: int | float | None, backbone: int) -> int:
    """A budget, given as a number or as a share of the backbone, as a number of parameters."""
    budget = DEFAULT_BUDGET if budget is None else budget
    if isinstance(budget, float) and budget >= 1:
        raise ValueError(f"budget: expected a whole number or a share below 1, got {budget}")
    return int(budget * backbone) if isinstance(budget, float) else budget


def _lora_rows(info: dict[str, ParameterInfo]) -> dict[str, tuple[tuple[int, int], ...]]:
    linear = {name: what for name, what in info.items() if what.kind == "linear"}
    rows = {
        name: tuple((b.start, b.stop) for b in what.row_blocks if b.operation in ("q", "v"))
        for name, what in linear.items()
    }
    if not any(rows.values()):
        rows = {name: ((0, what.shape[0]),) for name, what in linear.items() if what.block}
    rows = {name: ranges for name, ranges in rows.items() if ranges}
    if not rows:
        raise ValueError("method: the model has no linear matrices to put LoRA on")
    return rows


def _candidates(model: nn.Module) -> dict[str, ParameterInfo]:
    info = describe(model)
    return {name: info[name] for name in candidate_names(model)}


def _plan(
    model: nn.Module, unstructured: dict[str, torch.Tensor], structured: dict[str, LoraSpec]
) -> Plan:
    return Plan(
        unstructured=unstructured,
        structured=structured,
        info=_candidates(model),
        head=head_names(model),
        model_name=type(model).__name__,
        kind="lora" if structured else None,
        backbone_numel=backbone_numel(model),
    )
