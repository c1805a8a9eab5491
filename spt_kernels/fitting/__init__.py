"""What makes a training step fit into a given memory."""

from .allocation import PlanWithin, allocate_within
from .card import CARDS, Card, card_named, card_of
from .comparison import MethodWay, compare_ways
from .fit import Fitted, Fitting
from .recompute_plan import Levels, RecomputePlan, recompute

__all__ = [
    "CARDS",
    "Card",
    "Fitted",
    "Fitting",
    "Levels",
    "MethodWay",
    "PlanWithin",
    "RecomputePlan",
    "allocate_within",
    "card_named",
    "card_of",
    "compare_ways",
    "recompute",
]
