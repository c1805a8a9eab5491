"""What a user may choose to train: the method, its budget and rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

SPT_METHODS = {"spt-lora": "lora", "spt-adapter": "adapter", "spt-unstructured": None}
METHODS = (*SPT_METHODS, "lora", "linear", "bias", "full")

DEFAULT_BUDGET = 0.005  # the paper's 0.4M parameters are 0.5 % of ViT-B/16
DEFAULT_RANK = 8


@dataclass(frozen=True)
class Method:
    """What is trained beside the head.

    Attributes:
        name: one of `METHODS`.
        budget: parameters (int) or share of the backbone (float below 1); `None` is 0.5 %.
            Only the `spt-*` methods and `lora` have one.
        rank: rank of LoRA and Adapter modules. `None` is 8, and for `lora` with a budget the
            largest rank that fits it.
        samples: training images whose gradients are measured (the paper's C); `spt-*` only.
        rule: `"paper"` or `"published-code"`, see `spt_kernels.allocate`; `spt-*` only.
        scale: LoRA's factor.
        dropout: LoRA's dropout.
    """

    name: str = "spt-lora"
    budget: int | float | None = None
    rank: int | None = None
    samples: int = 800
    rule: str = "paper"
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.name!r}")
        has_budget = self.is_sensitivity_aware or self.name == "lora"
        if not has_budget and (self.budget is not None or self.rank is not None):
            given = "budget" if self.budget is not None else "rank"
            raise ValueError(f"{given}: method {self.name!r} has none; leave it out")
        check_number("budget", self.budget, int, float)
        check_number("rank", self.rank, int)
        if self.budget is not None and not self.budget > 0:
            raise ValueError(
                "budget: expected a number of parameters, or a share of the backbone below 1, "
                f"got {self.budget}"
            )
        check_positive("rank", self.rank)
        check_positive("samples", self.samples)
        check_within("dropout", self.dropout, 0.0, 1.0)
        if self.rule not in ("paper", "published-code"):
            raise ValueError(f"rule: expected paper or published-code, got {self.rule!r}")

    @property
    def is_sensitivity_aware(self) -> bool:
        """Whether this is one of SPT's methods, which need a `Sensitivity`."""
        return self.name in SPT_METHODS

    @property
    def structured(self) -> str | None:
        """SPT's structured tuning: `"lora"`, `"adapter"` or `None`."""
        return SPT_METHODS[self.name]


def check_number(name: str, value: Any, *kinds: type) -> None:
    """Refuse what is no number of one of these kinds, a truth value above all."""
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        wanted = "a number" if float in kinds else "a whole number"
        raise TypeError(f"{name}: expected {wanted}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuse zero, less, and what is not finite."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected more than zero, got {value}")


def check_within(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse what is below `low`, or not below `high`."""
    if value is not None and not low <= value < high:
        raise ValueError(f"{name}: expected at least {low:g} and below {high:g}, got {value}")
