"""From sensitivities and a budget to a `Plan`: the paper's selection (Eq. 4) and allocation (Eq. 5)."""

from __future__ import annotations

from .plan import AdapterSpec, LoraSpec, Plan

__all__ = ["AdapterSpec", "LoraSpec", "Plan", "allocate"]
