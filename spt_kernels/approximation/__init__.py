"""Less memory for gradients that are approximate: opt-in, labelled, and undone by the same call.

Names load on first use, so that the command line can read `choice` without waiting for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.first_use import names_on_first_use

_HOME = {"Approximation": "choice", "approximate": "approximate", "parse_approximation": "choice"}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .approximate import approximate as approximate
    from .choice import Approximation as Approximation
    from .choice import parse_approximation as parse_approximation

__getattr__ = names_on_first_use(__name__, _HOME)
