"""Every way to fine-tune, by name: `methods["lora-16"](model)` makes a plain model tunable.

`METHODS` is the one list of them, which finetune, memory, the cost table and the benches read. Each
has a file here with `plan(model, method, sensitivity)`, which decides what is trained, or
`tune(model, method, plan)`, which makes the model train it, or both. Where there is no `plan` the
method needs none, and where there is no `tune` the plan is applied.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .method import (
    DEFAULT_BUDGET,
    DEFAULT_RANK,
    METHODS,
    Entry,
    Method,
    entry_of,
    table_names,
)

if TYPE_CHECKING:
    from torch import nn

    from ..plan import Plan
    from ..sensitivity import Sensitivity
    from .tunable import Tunable

__all__ = [
    "DEFAULT_BUDGET",
    "DEFAULT_RANK",
    "METHODS",
    "Entry",
    "Method",
    "entry_of",
    "make_plan",
    "table_names",
    "tune",
]


def make_plan(
    model: nn.Module, method: Method, sensitivity: Sensitivity | None = None
) -> Plan | None:
    """Decide what `method` trains of `model`; `None` where that takes no plan.

    Args:
        model: the plain base model, which is not changed.
        method: which one, and its budget.
        sensitivity: needed by the methods that are sensitivity-aware.

    Raises:
        TypeError: the model is no module.
        ValueError: the budget is too small, or more than there is, or no sensitivity was given, or
            the model is tuned already.
    """
    _check_plain(model)
    if method.is_sensitivity_aware and sensitivity is None:
        raise ValueError(f"sensitivity: method {method.name!r} needs one")
    decide = getattr(_home_of(method), "plan", None)
    return None if decide is None else decide(model, method, sensitivity)


def tune(model: nn.Module, method: Method, plan: Plan | None = None) -> Tunable:
    """Make a plain model, in place, train by `method` what `make_plan` decided.

    Raises:
        TypeError: the model is no module.
        ValueError: the method cannot tune this architecture, or one that is quantized, or a library
            that it needs is missing, or the model is tuned already.
        BaseModelMismatch: the plan is for another model.
    """
    _check_plain(model)
    if plan is not None:
        from ..tuning import check_fits

        check_fits(model, plan)
    make = getattr(_home_of(method), "tune", None)
    if make is not None:
        _check_floats(model, method)
        made: Tunable = make(model, method, plan)
        for marked in (model, made.model):  # PEFT wraps one in the other
            vars(marked)["spt_method"] = method.name
        return made
    from .tunable import applied

    return applied(model, plan)


def _check_plain(model: nn.Module) -> None:
    from torch import nn

    from ..model.check import check_not_offloaded

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if hasattr(model, "spt_tuning") or hasattr(model, "spt_method"):
        raise ValueError("model: expected a plain one, got one that is tuned already (merge it)")
    check_not_offloaded(model, "tune")


def _check_floats(model: nn.Module, method: Method) -> None:
    """Refuse quantized weights where it is not `apply` that tunes: they are written or replaced."""
    from ..model.quantized import quantized_names

    for name, quantized in quantized_names(model).items():
        raise ValueError(
            f"method: {method.name} cannot train a quantized model, and {name} is quantized to "
            f"{quantized}: take spt-*, lora, adapter-K, sensitive-*, bias or linear"
        )


def _home_of(method: Method) -> ModuleType:
    return importlib.import_module(f".{method.entry.home}", __name__)


class _Methods(ModuleType):
    """This folder as a mapping from name to method; it iterates over families, as `lora-K`."""

    def __getitem__(self, name: str) -> Callable[..., Tunable]:
        entry_of(name)
        return partial(_tune_by_name, name)

    def __contains__(self, name: object) -> bool:
        try:
            entry_of(name)
        except ValueError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


def _tune_by_name(
    name: str, model: nn.Module, sensitivity: Sensitivity | None = None, **options: Any
) -> Tunable:
    """`methods[name](model)`; the options are those of `Method`."""
    method = Method(name, **options)
    return tune(model, method, make_plan(model, method, sensitivity))


sys.modules[__name__].__class__ = _Methods
