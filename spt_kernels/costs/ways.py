"""The rows of the cost table: how each way of fine-tuning prepares a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from ..allocation import Plan, allocate
from ..delta import merge, save_delta
from ..method_plan import backbone_numel
from ..optim import SparseAdamW, param_groups
from ..synthetic_sensitivity import skewed_sensitivity
from ..tuning import apply, replace_module
from .peers import PEERS
from .prepared import (
    LORA_RANK,
    Prepared,
    adamw,
    as_it_is,
    budget_of,
    freeze_backbone,
    lora_targets,
    prepared,
)
from .rivals import DiagonalLinear, MaskedLinear, PlainLora, PromptedBlock
from .setting import CostSetting


def _full(model: nn.Module, setting: CostSetting) -> Prepared:
    model.requires_grad_(True)
    return prepared(model, as_it_is, _bytes_of_state)


def _linear(model: nn.Module, setting: CostSetting) -> Prepared:
    freeze_backbone(model)
    return prepared(model, as_it_is, _bytes_of_trained)


def _prompt_deep(model: nn.Module, setting: CostSetting) -> Prepared:
    blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or width is None or prefix is None:
        raise ValueError("deep prompts need a plain ViT: blocks, embed_dim, num_prefix_tokens")
    prompts = max(1, budget_of(model) // (len(blocks) * width))
    freeze_backbone(model)
    for number, block in enumerate(blocks):
        blocks[number] = PromptedBlock(block, prompts, width, prefix)
    return prepared(model, as_it_is, _bytes_of_trained)


def _lora_16(model: nn.Module, setting: CostSetting) -> Prepared:
    targets = lora_targets(model)
    freeze_backbone(model)
    for name, linear in targets.items():
        replace_module(model, name, PlainLora(linear, LORA_RANK))
    return prepared(model, _merging(targets), _bytes_of_trained)


def _spt(structured: str | None, only_structured: bool = False) -> Callable[..., Prepared]:
    def prepare(model: nn.Module, setting: CostSetting) -> Prepared:
        plan = _plan(model, structured, setting.rank)
        if only_structured:
            plan = replace(plan, unstructured={})
        apply(model, plan)
        optimizer = SparseAdamW(param_groups(model), lr=1e-3)
        # an Adapter has a nonlinearity, which nothing can fold into a matrix
        deploy = as_it_is if structured == "adapter" else merge
        return Prepared(model, plan.num_trainable, optimizer, deploy, _bytes_of_task)

    return prepare


def _dense_gradient(model: nn.Module, setting: CostSetting) -> Prepared:
    return _unstructured_elsewhere(model, setting, MaskedLinear)


def _published_layer(model: nn.Module, setting: CostSetting) -> Prepared:
    return _unstructured_elsewhere(model, setting, DiagonalLinear)


def _unstructured_elsewhere(
    model: nn.Module, setting: CostSetting, layer: Callable[[nn.Linear, Tensor], nn.Module]
) -> Prepared:
    plan = _plan(model, None, setting.rank)
    freeze_backbone(model)
    replaced: list[str] = []
    for name, index in plan.unstructured.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name.endswith(".weight"):
            replace_module(model, name.rpartition(".")[0], layer(module, index))
            replaced.append(name.rpartition(".")[0])
        else:  # biases and norms are trained whole there
            model.get_parameter(name).requires_grad_()
    # what it would take as a file is not defined: the published code saves nothing
    return Prepared(model, plan.num_trainable, adamw(model), _merging(replaced), lambda _: 0)


WAYS: MappingProxyType[str, Callable[[nn.Module, CostSetting], Prepared]] = MappingProxyType(
    {
        "full": _full,
        "linear": _linear,
        "prompt-deep": _prompt_deep,
        "lora-16": _lora_16,
        "spt-lora-structured": _spt("lora", only_structured=True),
        "spt-lora": _spt("lora"),
        "spt-adapter": _spt("adapter"),
        "spt-unstructured": _spt(None),
        "dense-gradient": _dense_gradient,
        "published-layer": _published_layer,
        **PEERS,
    }
)


def _plan(model: nn.Module, structured: str | None, rank: int) -> Plan:
    budget = min(budget_of(model), backbone_numel(model))
    return allocate(skewed_sensitivity(model), budget, structured, rank)


def _merging(names: Iterable[str]) -> Callable[[nn.Module], nn.Module]:
    """Puts what each of these rival layers merges into in its place."""

    def merged(tuned: nn.Module) -> nn.Module:
        for name in names:
            replace_module(tuned, name, tuned.get_submodule(name).merged())  # type: ignore[operator]
        return tuned

    return merged


def _bytes_of_state(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _bytes_of_trained(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _bytes_of_task(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.safetensors"
        save_delta(model, path)
        return path.stat().st_size
