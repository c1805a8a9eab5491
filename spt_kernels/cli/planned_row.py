"""The row of a saved plan in what `spt-kernels memory` shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..finetuning.job.given_plan import check_agrees, load_plan, method_of
from ..memory.rows import Row


def row_of_plan(
    names: tuple[str, ...], file: Path, given: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, Row]:
    """The row of a saved plan, by the one name that was given, if any.

    Args:
        names: of methods; none or one.
        file: the plan.
        given: fields of `Method` that were asked for beside it.

    Raises:
        ValueError: there is no such file, or the plan is not of this method and with these fields.
    """
    plan = load_plan(file)
    check_agrees(plan, names[0] if names else None, given)
    if not names:
        return "the plan", Row(plan=plan)
    return names[0], Row(method_of(plan, names[0]), plan)
