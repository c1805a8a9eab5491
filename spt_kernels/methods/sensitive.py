"""LoRA or Adapters of one size on the matrices with most sensitive parameters (Figure 3b).

It is the criterion of SPT (He et al., ICCV 2023) alone, on the module of another method: where it
goes is chosen, and nothing is trained entry by entry. In `spt-lora` and `spt-adapter` a matrix gets
a module only where it has as many sensitive parameters as the module costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from ..plan import Plan, allocate, module_cost, module_spec
from ..plan.table import KINDS
from ..sensitivity import Sensitivity
from .method import PLACEMENT, Method
from .spt import check_head


def plan(model: nn.Module, method: Method, sensitivity: Sensitivity) -> Plan:
    """Put a module of rank K on one matrix after the other while the budget lasts.

    The budget selects that many of the most sensitive parameters (Eq. 4). The matrices, q, k and v
    of a fused qkv apart, are taken in the order of how many of these each holds, ties in the order
    of the model; one that the rest of the budget cannot pay for is passed over, and so is one that
    has no more entries than the module.

    Raises:
        ValueError: as `allocate`; the budget pays for no module; the method's head is not that of
            the sensitivity.
    """
    check_head(model, method, sensitivity)
    kind, rank = method.entry.structured or "lora", method.size
    selected = allocate(sensitivity, method.budget_or_default, None, from_block=method.from_block)
    places = sorted(_places(selected, kind, rank), key=lambda place: -place.count)
    left = selected.budget
    taken: dict[str, list[tuple[int, int]]] = {}
    for place in places:
        if place.cost <= left:
            taken.setdefault(place.name, []).append(place.rows)
            left -= place.cost
    if not taken:
        module = f"{KINDS[kind]} of rank {rank}"
        if not places:
            raise ValueError(
                f"method: no matrix with sensitive parameters is larger than {module}: a larger "
                "budget finds more such matrices, or choose a smaller rank"
            )
        least = min(place.cost for place in places)
        raise ValueError(f"budget: the smallest {module} costs {least:,}, got {selected.budget:,}")
    return replace(
        selected,
        unstructured={},
        structured={
            name: module_spec(
                kind, rank, sorted(taken[name]), info.shape[1], method.scale, method.dropout
            )
            for name, info in selected.info.items()
            if name in taken
        },
        rule=PLACEMENT,
        kind=kind,
        rank=rank,
        scale=method.scale,
        dropout=method.dropout,
    )


@dataclass(frozen=True)
class _Place:
    """Rows of a parameter, how many of their entries are sensitive, what a module there costs."""

    name: str
    rows: tuple[int, int]
    count: int
    cost: int


def _places(selected: Plan, kind: str, rank: int) -> Iterator[_Place]:
    for name, info in selected.info.items():
        counts = selected.selected[name] if info.takes_modules else ()
        for rows, count in zip(info.row_blocks, counts, strict=False):
            d_in, d_out = info.shape[1], rows.stop - rows.start
            cost = module_cost(kind, rank, d_in, d_out)
            if count and cost < d_in * d_out:
                yield _Place(name, (rows.start, rows.stop), count, cost)
