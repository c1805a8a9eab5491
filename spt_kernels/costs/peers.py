"""Ways of fine-tuning that other libraries offer, with the same number of parameters to spend."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..anatomy import head_names
from .prepared import LORA_RANK, Prepared, block_matrices, budget_of, lora_targets, prepared
from .setting import CostSetting


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("peft is not installed (pip install peft)") from error
    return peft


def _lora(model: nn.Module, setting: CostSetting) -> Prepared:
    config = functools.partial(_peft().LoraConfig, r=LORA_RANK)
    return _tuned(model, config, list(lora_targets(model)))


def _lora_all(model: nn.Module, setting: CostSetting) -> Prepared:
    return _on_all(model, _peft().LoraConfig)


def _shira(model: nn.Module, setting: CostSetting) -> Prepared:
    # a matrix trains rank × (rows + columns) entries, as many as a LoRA of that rank
    return _on_all(model, _peft().ShiraConfig)


def _super_tuning(model: nn.Module, setting: CostSetting) -> Prepared:
    peft = _peft()
    if not hasattr(peft, "SupertuningConfig"):
        raise ValueError(f"peft {peft.__version__} has no Super-Tuning, later versions have")
    matrices = block_matrices(model)
    share = budget_of(model) / sum(what.numel for what in matrices.values())
    config = functools.partial(peft.SupertuningConfig, sparsity=1 - share)
    return _tuned(model, config, list(matrices))


PEERS: MappingProxyType[str, Callable[[nn.Module, CostSetting], Prepared]] = MappingProxyType(
    {
        "peft-lora-16": _lora,
        "peft-lora-all": _lora_all,
        "peft-shira": _shira,
        "peft-super-tuning": _super_tuning,
    }
)


def _on_all(model: nn.Module, config: Callable[..., Any]) -> Prepared:
    """On every matrix of the blocks, of the highest rank that the budget allows."""
    matrices = block_matrices(model)
    of_rank_1 = sum(sum(what.shape) for what in matrices.values())
    rank = budget_of(model) // of_rank_1
    if rank < 1:
        raise ValueError(f"rank 1 on every matrix trains {of_rank_1:,}, past the budget")
    return _tuned(model, functools.partial(config, r=rank), list(matrices))


def _tuned(model: nn.Module, config: Callable[..., Any], targets: list[str]) -> Prepared:
    names = head_names(model)
    heads = sorted({name.rpartition(".")[0] for name in names})
    numel = sum(model.get_parameter(name).numel() for name in names)
    tuned = _peft().get_peft_model(model, config(target_modules=targets, modules_to_save=heads))
    return prepared(tuned, _merged, _bytes_of_adapter, numel)


def _merged(tuned: Any) -> nn.Module:
    plain: nn.Module = tuned.merge_and_unload()
    return plain


def _bytes_of_adapter(tuned: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@contextlib.contextmanager
def accountable(model: nn.Module) -> Iterator[nn.Module]:
    """`model` with SHiRA's forward in operations that fake tensors can do, until the block ends.

    PEFT adds a sparse tensor to a copy of the weight, of which fake tensors know no gradient.
    Adding the values at their positions makes and keeps tensors of the same sizes.
    """
    changed = [module for module in model.modules() if hasattr(module, "shira_weight")]
    for module in changed:
        module.forward = functools.partial(_shira_forward, module)  # type: ignore[method-assign]
    try:
        yield model
    finally:
        for module in changed:
            del module.forward


def _shira_forward(layer: Any, x: Tensor) -> Tensor:
    weight = layer.base_layer.weight.clone()
    values = layer.shira_weight["default"] * layer.scaling["default"]
    rows, columns = layer.shira_indices["default"]
    weight.index_put_((rows, columns), values.to(weight.dtype), accumulate=True)
    bias = layer.base_layer.bias
    return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
