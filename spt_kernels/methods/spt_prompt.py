"""Prompts in the blocks that hold the sensitive parameters: SPT's criterion on VPT (Figure 3b)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from ..plan import Plan, allocate
from ..sensitivity import Sensitivity
from .method import PLACEMENT, Method
from .prompted import PlainVit, PromptedBlock
from .spt import check_head
from .tunable import Tunable, counted, freeze_backbone


def plan(model: nn.Module, method: Method, sensitivity: Sensitivity) -> Plan:
    """How many of the most sensitive parameters, as many as the budget (Eq. 4), each block holds.

    The plan trains nothing by itself: no task file could hold a prompt. `tune` reads its counts.

    Raises:
        ValueError: as `allocate`; the model is no plain ViT; the budget does not pay for a prompt,
            or no block holds a sensitive parameter; the head is not that of the sensitivity.
    """
    check_head(model, method, sensitivity)
    selected = allocate(sensitivity, method.budget_or_default, None)
    made = replace(selected, unstructured={}, rule=PLACEMENT)
    prompts_by_block(PlainVit.of(model, method), made)  # or refuses
    return made


def tune(model: nn.Module, method: Method, plan: Plan) -> Tunable:
    """Give each block its share of the prompts that the plan's budget pays for.

    Raises:
        ValueError: as `plan`.
    """
    vit = PlainVit.of(model, method)
    head = method.head_with(plan)
    shares = prompts_by_block(vit, plan)
    freeze_backbone(model, head)
    for number, count in enumerate(shares):
        if count:
            prompted = PromptedBlock(vit.blocks[number], vit.prompts(count), vit.num_prefix)
            vit.blocks[number] = prompted
    return replace(counted(model, head=head), plan=plan)


def prompts_by_block(vit: PlainVit, plan: Plan) -> list[int]:
    """As many prompts as the budget pays for, in proportion to the counts of the blocks.

    What whole prompts leave over goes to the blocks with the largest rests, the first of equals.

    Raises:
        ValueError: the budget does not pay for a prompt, or all counts are zero.
    """
    count = plan.budget // vit.width
    if not count:
        raise ValueError(f"budget: a prompt costs {vit.width:,}, got {plan.budget:,}")
    sensitive: Counter[str] = Counter()
    for name, counts in plan.selected.items():
        sensitive[plan.info[name].block] += sum(counts)
    held = [sensitive[f"blocks.{number}"] for number in range(len(vit.blocks))]
    total = sum(held)
    if not total:
        raise ValueError(f"budget: {plan.budget:,} selects no parameter of a block")
    shares = [count * own // total for own in held]
    rests = sorted(range(len(held)), key=lambda number: -(count * held[number] % total))
    for number in rests[: count - sum(shares)]:
        shares[number] += 1
    return shares
