"""Prompts in the blocks that hold the sensitive parameters: SPT's criterion on VPT (Figure 3b)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..plan import Plan, allocate
from ..sensitivity import Sensitivity
from .method import PLACEMENT, Method
from .prompt_places import PromptPlace, drawn_prompts, prompt_places
from .spt import check_head
from .tunable import Tunable, counted, freeze_backbone


def plan(model: nn.Module, method: Method, sensitivity: Sensitivity) -> Plan:
    """How many of the most sensitive parameters, as many as the budget (Eq. 4), each block holds.

    The plan trains nothing by itself: no task file could hold a prompt. `tune` reads its counts.

    Raises:
        ValueError: as `allocate`; the model is no plain ViT and no Swin; the budget does not pay
            for a prompt in a block with sensitive parameters; the head is not that of the
            sensitivity.
    """
    check_head(model, method, sensitivity)
    selected = allocate(sensitivity, method.budget_or_default, None, from_block=method.from_block)
    made = replace(selected, unstructured={}, rule=PLACEMENT)
    prompts_by_block(prompt_places(model, method), made)  # or refuses
    return made


def tune(model: nn.Module, method: Method, plan: Plan) -> Tunable:
    """Give each block its share of the prompts that the plan's budget pays for.

    Raises:
        ValueError: as `plan`.
    """
    places, head = prompt_places(model, method), method.head_with(plan)
    counts = prompts_by_block(places, plan)
    freeze_backbone(model, head)
    for place, count in zip(places, counts, strict=True):
        if count:
            place.put(drawn_prompts(model, count, place.width))
    return replace(counted(model, head=head), plan=plan)


def prompts_by_block(places: Sequence[PromptPlace], plan: Plan) -> list[int]:
    """For each block the prompts that its part of the budget pays for: that of its counts.

    What is left over buys one more for the blocks that lack least to it, the first of equals.

    Raises:
        ValueError: the budget does not pay for a prompt in a block with sensitive parameters.
    """
    sensitive: Counter[str] = Counter()
    for name, counts in plan.selected.items():
        sensitive[plan.info[name].block] += sum(counts)
    held = [sensitive[place.block] for place in places]
    total = max(1, sum(held))
    parts = [
        plan.budget * own / total / place.width for own, place in zip(held, places, strict=True)
    ]
    prompts = [int(part) for part in parts]
    left = plan.budget - sum(n * place.width for n, place in zip(prompts, places, strict=True))
    for number in sorted(range(len(parts)), key=lambda number: prompts[number] - parts[number]):
        if held[number] and places[number].width <= left:
            prompts[number] += 1
            left -= places[number].width
    if not any(prompts):
        least = min(place.width for place in places)
        raise ValueError(f"budget: a prompt costs {least:,} and more, got {plan.budget:,}")
    return prompts
