"""From sensitivities to a `Plan`: the paper's allocation (Eq. 5) of what a budget selects."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..distributed.sharded import group_of_rows, is_sharded, local_part, local_rows
from ..sensitivity import Sensitivity
from .blocks import block_named, blocks_in_order, names_below
from .captured import captured
from .plan import Plan
from .selection import (
    Overspent,
    Segment,
    Selected,
    on_host,
    overspent,
    select,
    select_by_cost,
    select_shared,
)
from .specs import module_cost, module_spec
from .within import check_memory, earliest_within

# "published-code": a matrix is structured from σ/α selected entries on, a vector whole from 1/β
ALPHA = 10
BETA = 5


def allocate(
    sensitivity: Sensitivity,
    budget: int | float,
    structured: str | None = "lora",
    rank: int = 8,
    *,
    rule: str = "paper",
    scale: float = 1.0,
    dropout: float = 0.1,
    from_block: int | str | None = None,
    memory_bytes: int | float | None = None,
    peak_of: Callable[[Plan], int] | None = None,
) -> Plan:
    """Spend a budget of trainable parameters where they matter most.

    All candidates are ranked by sensitivity, ties in the order of the model. The selection (Eq. 4)
    is the shortest prefix of that ranking that costs the budget, and a matrix costs (Eq. 5)
    `min(count, σ)` for `count` selected entries: below σ its selected entries are trained, from σ
    on a LoRA (σ = `rank · (d_in + d_out)`) or an Adapter (σ = `2 · rank · d + rank + d`) takes
    their place. q, k and v of a fused qkv are three matrices, and a 1×1 convolution is one, of
    channels. Biases, norms and other convolutions are always trained entry by entry. The budget is
    never exceeded, and under the paper's rule spent to the last parameter.

    `rule="published-code"` follows the authors' scripts instead: a matrix is structured from σ/10
    selected entries on, and a bias or norm trained whole from a fifth on. It takes the prefix that
    costs the most that fits, where the scripts try 79 prefixes and keep the one nearest to the
    budget, even if above it, and charge another 768 for the class token.

    The blocks below the first that is tuned keep nothing for the backward, which ends above them:
    with `from_block` or `memory_bytes` the budget is spent on what comes later. `plan.forgone` says
    what that costs in sensitivity.

    Args:
        sensitivity: scores ≥ 0 of all candidates. They may be sharded, as the gradients are that
            `fully_shard` makes: then every process calls this, and gets the same plan; scores are
            not gathered.
        budget: most parameters to train besides the head: a count, or a share of the backbone
            in (0, 1), rounded down.
        structured: `"lora"`, `"adapter"`, or `None` to train entries only.
        rank: inner width of the LoRA or Adapter modules.
        rule: `"paper"` or `"published-code"`.
        scale: factor of the LoRA updates.
        dropout: input dropout of the LoRA modules.
        from_block: tune nothing before this block, neither the stem, positions and tokens: its name
            (`"blocks.6"`, `"encoder.layer.6"`, `"stages.2.blocks.1"`, or `"stages.2"` for the first
            one there) or its number, counted from 0 through all stages.
        memory_bytes: forbid as few early blocks as must be, from `from_block` on if that is given,
            for `peak_of(plan)` to be at most this.
        peak_of: the peak of a training step by a plan, in bytes. `allocate_within` is `allocate`
            with that of a model.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, a budget above what there is to spend, scores that
            are negative or not finite, no such block, names that tell no blocks, or a memory that
            no plan fits into.
    """
    check_memory(memory_bytes, peak_of)
    options: dict[str, Any] = {"rule": rule, "scale": scale, "dropout": dropout}

    def plan_from(block: int | str | None) -> Plan:
        [plan] = allocate_each(sensitivity, [budget], structured, rank, **options, from_block=block)
        return plan

    if memory_bytes is None or peak_of is None:
        return plan_from(from_block)
    _check_sensitivity(sensitivity)
    info = sensitivity.info
    start = None if from_block is None else block_named(info, from_block)
    blocks = blocks_in_order(info)
    later = blocks if start is None else blocks[blocks.index(start) + 1 :]
    return earliest_within(plan_from, start, later, memory_bytes, peak_of)


def allocate_each(
    sensitivity: Sensitivity,
    budgets: Sequence[int | float],
    structured: str | None = "lora",
    rank: int = 8,
    *,
    rule: str = "paper",
    scale: float = 1.0,
    dropout: float = 0.1,
    from_block: int | str | None = None,
) -> list[Plan]:
    """`allocate` for several budgets, in hardly more time than for the largest of them.

    However many budgets there are, the scores themselves are read as often as for one.

    Returns:
        For each budget, in the order given, the plan that `allocate` makes of it.

    Raises:
        TypeError: as `allocate`.
        ValueError: as `allocate`, if any of the budgets cannot be had.
    """
    _check_sensitivity(sensitivity)
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise TypeError(f"budgets must be a sequence of budgets, got {budgets!r}: see allocate")
    _check_options(structured, rank, rule, scale, dropout)
    rank, scale, dropout = int(rank), float(scale), float(dropout)  # numpy's, which no file holds
    counts = [_as_count(budget, sensitivity.backbone_numel) for budget in budgets]
    segments = _segments(sensitivity, structured, rank, rule)
    group = _group_of(sensitivity)
    choose = partial(_select, budgets=counts, rule=rule, group=group)
    selections, start, forgone = choose(segments), "", [0.0] * len(counts)
    if from_block is not None:
        start = block_named(sensitivity.info, from_block)
        below = names_below(sensitivity.info, start)
        anywhere = [captured(segments, selected, group) for selected in selections]
        segments = [segment for segment in segments if segment.name not in below]
        try:
            selections = choose(segments)
        except Overspent as error:
            raise Overspent(f"{error}, from {start} on") from None
        own = [captured(segments, selected, group) for selected in selections]
        # rounding, or more modules of the published rule, may take it below zero
        forgone = [max(0.0, 1 - some / all_) for some, all_ in zip(own, anywhere, strict=True)]
    options: dict[str, Any] = {"kind": structured, "rank": rank, "scale": scale, "dropout": dropout}
    return [
        Plan(
            **_assign(segments, selected, sensitivity, **options),
            **options,
            info=sensitivity.info,
            budget=budget,
            head=sensitivity.head,
            head_source=sensitivity.head_source,
            model_name=sensitivity.model_name,
            rule=rule,
            num_samples=sensitivity.num_samples,
            backbone_numel=sensitivity.backbone_numel,
            from_block=start,
            forgone=share,
        )
        for budget, selected, share in zip(counts, selections, forgone, strict=True)
    ]


def _check_sensitivity(sensitivity: Any) -> None:
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"sensitivity must be a Sensitivity, got {type(sensitivity).__name__}: scores of one's "
            "own become one by Sensitivity.from_tensors"
        )


def _group_of(sensitivity: Sensitivity) -> Any:
    """The processes among which the scores are dealt out; None where each has all."""
    groups = {id(g): g for g in map(group_of_rows, sensitivity.values())}
    if len(groups) > 1:
        raise ValueError(
            "sensitivity: some scores are sharded and others are not, or over other processes: "
            "expected all of them dealt out over one mesh"
        )
    return next(iter(groups.values()), None)


def _segments(
    sensitivity: Sensitivity, structured: str | None, rank: int, rule: str
) -> list[Segment]:
    alpha, beta = (ALPHA, BETA) if rule == "published-code" else (1, 1)
    segments = []
    for name, scores in sensitivity.items():
        info = sensitivity.info[name]
        if scores.dtype not in (torch.float32, torch.bfloat16):
            scores = scores.float()
        n_rows = info.shape[0] if info.shape else 1
        row_numel = info.numel // max(1, n_rows)
        begin, end = 0, n_rows
        if is_sharded(scores):
            begin, end = local_rows(scores)
            scores = local_part(scores)
        flat = scores.detach().reshape(-1)  # [numel], a view of a contiguous score
        for place, block in enumerate(info.row_blocks):
            offset, d_out = block.start * row_numel, block.stop - block.start
            numel = d_out * row_numel
            low = min(max(block.start, begin), block.stop)  # the rows that are here, if any
            high = max(min(block.stop, end), low)
            here = flat[(low - begin) * row_numel : (high - begin) * row_numel]
            # entries are trained one by one, which at the last one means all of them
            threshold, cost, is_structured = numel, numel, False
            if info.takes_modules and structured:
                sigma = module_cost(structured, rank, info.shape[1], d_out)
                # a matrix with fewer entries than the threshold can never reach it
                if -(-sigma // alpha) <= numel:
                    threshold, cost, is_structured = -(-sigma // alpha), sigma, True
            elif info.kind in ("bias", "norm") and len(info.shape) == 1:
                threshold = -(-numel // beta)
            segments.append(
                Segment(
                    name,
                    place,
                    here,
                    offset,
                    numel,
                    threshold,
                    cost,
                    is_structured,
                    (low - block.start) * row_numel,
                )
            )
    return segments


def _select(segments: list[Segment], budgets: list[int], rule: str, group: Any) -> list[Selected]:
    if group is not None and rule != "paper":
        raise ValueError(f"rule={rule!r} needs scores that are whole, not sharded ones")
    if group is not None:
        return select_shared(segments, budgets, group)
    if rule == "published-code":
        return select_by_cost(segments, budgets)
    try:
        return select(segments, budgets)
    except ValueError:
        # the usual reason, in the caller's terms; the op itself names the scores at fault
        most = sum(min(int((s.scores > 0).sum()), s.threshold) for s in segments)
        are_valid = ((torch.isfinite(s.scores) & (s.scores >= 0)).all() for s in segments)
        if max(budgets) > most and all(are_valid):
            raise overspent(max(budgets), most) from None
        raise


def _assign(
    segments: Sequence[Segment],
    selected: Selected,
    sensitivity: Sensitivity,
    kind: str | None,
    rank: int,
    scale: float,
    dropout: float,
) -> dict[str, Any]:
    """Eq. 5: what is trained entry by entry, and which rows are structured, as fields of a plan."""
    parts: dict[str, list[Tensor]] = {}
    rows: dict[str, list[tuple[int, int]]] = {}
    counts: dict[str, tuple[int, ...]] = {}
    ranked = {segment.name for segment in segments}
    are_single = [0 < n < s.threshold for n, s in zip(selected.counts, segments, strict=True)]
    single = iter(on_host(list(compress(selected.positions, are_single))))
    for segment, count, is_single in zip(segments, selected.counts, are_single, strict=True):
        counts[segment.name] = (*counts.get(segment.name, ()), count)
        if count == 0:
            continue
        if is_single:
            parts.setdefault(segment.name, []).append(next(single) + segment.offset)
        elif segment.structured:
            block = sensitivity.info[segment.name].row_blocks[segment.block]
            rows.setdefault(segment.name, []).append((block.start, block.stop))
        else:
            whole = torch.arange(segment.offset, segment.offset + segment.numel, device="cpu")
            parts.setdefault(segment.name, []).append(whole)
    specs = {
        name: module_spec(kind, rank, ranges, sensitivity.info[name].shape[1], scale, dropout)
        for name, ranges in rows.items()
        if kind is not None
    }
    unstructured = {name: torch.cat(p) if len(p) > 1 else p[0] for name, p in parts.items()}
    counts |= {n: (0,) * len(i.row_blocks) for n, i in sensitivity.info.items() if n not in ranked}
    return {"unstructured": unstructured, "structured": specs, "selected": counts}


def _as_count(budget: int | float, backbone_numel: int) -> int:
    """The budget as a number of parameters."""
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be an int or a float, got {budget!r}")
    if isinstance(budget, numbers.Integral):
        if budget < 1:
            raise ValueError(f"budget must be at least 1 parameter, got {budget}")
        return int(budget)
    if not 0 < budget < 1:
        raise ValueError(
            "budget must be an int (a number of parameters) or a float in (0, 1) (a share of the "
            f"backbone), got {budget!r}"
        )
    if int(budget * backbone_numel) < 1:
        raise ValueError(f"budget={budget} of a backbone of {backbone_numel} is no parameter")
    return int(budget * backbone_numel)


def _check_options(
    structured: str | None, rank: int, rule: str, scale: float, dropout: float
) -> None:
    if structured not in ("lora", "adapter", None):
        raise ValueError(f"structured must be 'lora', 'adapter' or None, got {structured!r}")
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if rule not in ("paper", "published-code"):
        raise ValueError(f"rule must be 'paper' or 'published-code', got {rule!r}")
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not zero, got {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
