"""The trainable parameters in groups: what weight decay is for, and what it is not for."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..layers import delta_of, tuned_modules
from ..layers.parameter import AttachedParameters
from ..tuning import train_cast_heads

# Trained tokens and tables have two or more dimensions, yet decay pulls them to no useful place
_NEVER_DECAYED = ("_token", "pos_embed", "_position_bias_table")


def param_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, for any torch optimizer.

    Weight decay is for matrices: the head, LoRA and Adapter. Deltas, biases, norms and other
    vectors, class and position tokens, and whatever the model lists in `no_weight_decay()`, are
    not decayed.

    A head that was cast to 16 bits after `apply` is trained in fp32 from here on, in place, as one
    is that `apply` has found in 16 bits.

    Args:
        model: tuned or plain; parameters that need no gradient are left out.
        weight_decay: of the first group; the paper's is 1e-4.

    Returns:
        Two groups, by name "decayed" and "not decayed", each ordered by parameter name; one of them
        may be empty.

    Raises:
        TypeError: `model` is no module, or `weight_decay` no number.
        ValueError: nothing is trainable, or `weight_decay` is below 0.
        RuntimeError: `DistributedDataParallel` was made before something that is trained now, such
            as the values of that head, and would not average its gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_not_negative("weight_decay", weight_decay)
    train_cast_heads(model)
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    _check_known(model)
    if not named:
        raise ValueError("model has no trainable parameters: apply a plan to it first")
    for module in tuned_modules(model).values():
        if isinstance(module, AttachedParameters):
            module.take_in_edits()
    asked = (getattr(each, "no_weight_decay", None) for each in (model, _wrapped(model)))
    exempt = {name for ask in asked if callable(ask) for name in ask()}
    decays = {name: p.dim() >= 2 and not _is_exempt(_base(name, p), exempt) for name, p in named}
    return [
        {
            "name": "decayed",
            "params": [p for name, p in named if decays[name]],
            "weight_decay": weight_decay,
        },
        {
            "name": "not decayed",
            "params": [p for name, p in named if not decays[name]],
            "weight_decay": 0.0,
        },
    ]


def _base(name: str, parameter: Tensor) -> str:
    """The name of what is trained: of a parameter of 16 bits, not that of its values in fp32."""
    delta = delta_of(parameter)
    return name if delta is None or not delta.whole else name.removesuffix("_fp32")


def _wrapped(model: nn.Module) -> Any:
    """What is wrapped, as in DistributedDataParallel, if anything is."""
    return getattr(model, "module", None)


def _check_known(model: nn.Module) -> None:
    """Refuse what a wrapper does not know of, as it was made before."""
    for wrapper in model.modules():
        if not isinstance(wrapper, DistributedDataParallel):
            continue
        known = {id(parameter) for parameter in wrapper._module_parameters}
        for name, parameter in wrapper.module.named_parameters():
            is_left_out = name in wrapper.parameters_to_ignore
            if parameter.requires_grad and id(parameter) not in known and not is_left_out:
                raise RuntimeError(
                    f"{name} is trained, and DistributedDataParallel, which was made before it, "
                    "would not average its gradients: call spt.apply, casts to 16 bits and "
                    "param_groups before DistributedDataParallel"
                )


def _is_exempt(name: str, exempt: set[str]) -> bool:
    # whatever is around a model puts something before the names that it lists
    is_listed = any(f".{name}".endswith(f".{listed}") for listed in exempt)
    return is_listed or name.endswith(_NEVER_DECAYED)


def check_not_negative(name: str, value: Any) -> None:
    """Raise unless a hyperparameter is a number of at least 0."""
    if not isinstance(value, (numbers.Real, Tensor)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not float(value) >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_no_amsgrad(groups: Iterable[dict[str, Any]], kind: str) -> None:
    """Raise where groups, as from a state dict of torch's, ask an optimizer for a third mean."""
    if any(group.get("amsgrad") for group in groups):
        raise ValueError(f"amsgrad: expected False, {kind} keeps two means alone")
