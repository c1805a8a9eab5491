"""The ways of tuning a model whose memory is compared: ours, PEFT's, everything and the head."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.anatomy import candidate_names, describe, head_names
from spt_kernels.plan import Plan
from spt_kernels.synthetic_sensitivity import skewed_sensitivity

BUDGET = 400_000
RANK = 16  # of the paper's LoRA-16
SHIRA_RANK = 3  # 442,368 entries on ViT-B/16, the nearest to the budget from above

FULL, LINEAR = "full fine-tuning", "linear probe"
LORA = "PEFT LoRA-16"
LORA_DROPOUT = "PEFT LoRA-16, dropout 0.1"
LORA_EVERYWHERE = "PEFT LoRA-16, our matrices"
SHIRA = "PEFT SHiRA, all matrices"
STRUCTURED_ONLY = "SPT-LoRA w/o unstructured"
SPT_LORA, SPT_ADAPTER, UNSTRUCTURED = "SPT-LoRA", "SPT-Adapter", "SPT-unstructured"

Prepare = Callable[[nn.Module], nn.Module]


def methods(model: nn.Module) -> dict[str, Prepare]:
    """Name -> a function that makes a copy of the plain model ready to be trained that way.

    LoRA-16 is the paper's: rank 16 on the query and value matrices. On timm's fused `qkv` PEFT puts
    one LoRA of rank 16, which has the same number of parameters and, with one down-projection,
    keeps no more. Without dropout it keeps least, so the targets are held against that. A model
    without attention gets it on the linear layers of our plan.
    """
    sensitivity = skewed_sensitivity(model)
    plans = {kind: spt.allocate(sensitivity, BUDGET, kind) for kind in ("lora", "adapter", None)}
    ours = _linears_of(plans["lora"])
    qkv = [name for name in ours if name.endswith(".qkv")] and r".*\.qkv"
    rows: dict[str, Prepare] = {FULL: _full, LINEAR: _linear_probe}
    if qkv:
        rows[LORA] = functools.partial(_lora, targets=qkv)
        rows[LORA_DROPOUT] = functools.partial(_lora, targets=qkv, dropout=0.1)
    rows[LORA_EVERYWHERE] = functools.partial(_lora, targets=ours)
    rows[SHIRA] = _shira
    alone = replace(plans["lora"], unstructured={})
    rows[STRUCTURED_ONLY] = functools.partial(_tuned, plan=alone)
    rows[SPT_LORA] = functools.partial(_tuned, plan=plans["lora"])
    rows[SPT_ADAPTER] = functools.partial(_tuned, plan=plans["adapter"])
    rows[UNSTRUCTURED] = functools.partial(_tuned, plan=plans[None])
    return rows


def _linears_of(plan: Plan) -> list[str]:
    """Modules of the linear matrices that a plan trains anything of."""
    names = dict.fromkeys([*plan.structured, *plan.unstructured])
    return [n.removesuffix(".weight") for n in names if plan.info[n].kind == "linear"]


def _full(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(True)


def _linear_probe(model: nn.Module) -> nn.Module:
    return _with_head(copy.deepcopy(model).requires_grad_(False), model)


def _tuned(model: nn.Module, plan: Plan) -> nn.Module:
    return spt.apply(copy.deepcopy(model), plan)


def _lora(model: nn.Module, targets: str | Sequence[str], dropout: float = 0.0) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, target_modules=targets, lora_dropout=dropout)
    return _with_head(peft.get_peft_model(copy.deepcopy(model), config), model)


def _shira(model: nn.Module) -> nn.Module:
    import peft

    info = describe(model)
    linear = [n for n in candidate_names(model) if info[n].kind == "linear" and info[n].block]
    targets = [name.removesuffix(".weight") for name in linear]
    config = peft.ShiraConfig(r=SHIRA_RANK, target_modules=targets)
    return _with_head(peft.get_peft_model(copy.deepcopy(model), config), model)


def _with_head(tuned: nn.Module, plain: nn.Module) -> nn.Module:
    """`tuned` with the parameters of the plain model's head trained as well."""
    heads = head_names(plain)
    for name, parameter in tuned.named_parameters():
        if name.removeprefix("base_model.model.") in heads:
            parameter.requires_grad_(True)
    return tuned


def accountable(model: nn.Module) -> nn.Module:
    """`model`, in place, with SHiRA's forward in operations that fake tensors can do.

    PEFT adds a sparse tensor to a copy of the weight, of which fake tensors know no gradient.
    Adding the values at their positions makes and keeps tensors of the same sizes.
    """
    for module in model.modules():
        if hasattr(module, "shira_weight"):
            module.forward = functools.partial(_shira_forward, module)  # type: ignore[method-assign]
    return model


def _shira_forward(layer: nn.Module, x: Tensor) -> Tensor:
    weight = layer.base_layer.weight.clone()
    values = layer.shira_weight["default"] * layer.scaling["default"]
    rows, columns = layer.shira_indices["default"]
    weight.index_put_((rows, columns), values.to(weight.dtype), accumulate=True)
    return F.linear(x, weight, layer.base_layer.bias)
