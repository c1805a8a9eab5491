"""From sensitivities to a `Plan`: the paper's selection (Eq. 4) and allocation (Eq. 5)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.top_tau import top_tau
from .plan import AdapterSpec, LoraSpec, Plan
from .sensitivity import Sensitivity

__all__ = ["AdapterSpec", "LoraSpec", "Plan", "allocate"]

# "published-code": a matrix is structured from σ/α selected entries on, a vector whole from 1/β
ALPHA = 10
BETA = 5


@dataclass(frozen=True)
class Segment:
    """One matrix (a row block) or vector of the ranking, and what it costs to train.

    Attributes:
        name: the parameter it belongs to.
        block: which of the parameter's row blocks it is.
        scores: view of its sensitivities, flat, contiguous.
        offset: flat position of its first element in the parameter.
        threshold: selected entries from which on it is no longer trained entry by entry.
        cost: parameters trained once the threshold is reached.
        structured: whether those are a LoRA's or an Adapter's; else they are all of its entries.
    """

    name: str
    block: int
    scores: Tensor
    offset: int
    threshold: int
    cost: int
    structured: bool


def allocate(
    sensitivity: Sensitivity,
    budget: int | float,
    structured: str | None = "lora",
    rank: int = 8,
    *,
    rule: str = "paper",
    scale: float = 1.0,
    dropout: float = 0.1,
) -> Plan:
    """Spend a budget of trainable parameters where they matter most.

    All candidates are ranked by sensitivity, ties in the order of the model. The selection (Eq. 4)
    is the shortest prefix of that ranking that costs the budget, and a matrix costs (Eq. 5)
    `min(count, σ)` for `count` selected entries: below σ its selected entries are trained, from σ
    on a LoRA (σ = `rank · (d_in + d_out)`) or an Adapter (σ = `2 · rank · d + rank + d`) takes
    their place. q, k and v of a fused qkv are three matrices. Biases, norms and convolutions are
    always trained entry by entry. The budget is never exceeded, and under the paper's rule spent
    to the last parameter.

    `rule="published-code"` follows the authors' scripts instead: a matrix is structured from σ/10
    selected entries on, and a bias or norm trained whole from a fifth on. It takes the prefix that
    costs the most that fits, where the scripts try 79 prefixes and keep the one nearest to the
    budget, even if above it, and charge another 768 for the class token.

    Args:
        sensitivity: scores ≥ 0 of all candidates.
        budget: most parameters to train besides the head: a count, or a share of the backbone
            in (0, 1), rounded down.
        structured: `"lora"`, `"adapter"`, or `None` to train entries only.
        rank: inner width of the LoRA or Adapter modules.
        rule: `"paper"` or `"published-code"`.
        scale: factor of the LoRA updates.
        dropout: input dropout of the LoRA modules.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, a budget above what there is to spend, or scores that
            are negative or not finite.
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"sensitivity must be a Sensitivity, got {type(sensitivity).__name__}: scores of one's "
            "own become one by Sensitivity.from_tensors"
        )
    _check_options(structured, rank, rule, scale, dropout)
    budget = _as_count(budget, sensitivity.backbone_numel)
    segments = _segments(sensitivity, structured, rank, rule)
    if rule == "paper":
        try:
            selected, counts = _select(segments, budget)
        except ValueError:
            # the usual reason, in the caller's terms; the op itself names the scores at fault
            most = sum(min(int((s.scores > 0).sum()), s.threshold) for s in segments)
            if budget > most and all(_is_valid(s.scores) for s in segments):
                raise _overspent(budget, most) from None
            raise
    else:
        selected, counts = _select_by_cost(segments, budget)
    unstructured, rows = _assign(segments, selected, counts, sensitivity)
    by_name: dict[str, tuple[int, ...]] = {}
    for segment, count in zip(segments, counts, strict=True):
        by_name[segment.name] = (*by_name.get(segment.name, ()), count)
    specs: dict[str, LoraSpec | AdapterSpec] = {}
    for name, ranges in rows.items():
        if structured == "lora":
            in_features = sensitivity.info[name].shape[1]
            specs[name] = LoraSpec(rank, tuple(ranges), in_features, scale, dropout)
        else:
            specs[name] = AdapterSpec(rank, tuple(ranges))
    return Plan(
        unstructured=unstructured,
        structured=specs,
        info=sensitivity.info,
        selected=by_name,
        budget=budget,
        head=sensitivity.head,
        model_name=sensitivity.model_name,
        rule=rule,
        kind=structured,
        rank=rank,
        scale=scale,
        dropout=dropout,
        num_samples=sensitivity.num_samples,
        backbone_numel=sensitivity.backbone_numel,
    )


def _segments(
    sensitivity: Sensitivity, structured: str | None, rank: int, rule: str
) -> list[Segment]:
    alpha, beta = (ALPHA, BETA) if rule == "published-code" else (1, 1)
    segments = []
    for name, scores in sensitivity.items():
        info = sensitivity.info[name]
        if scores.dtype not in (torch.float32, torch.bfloat16):
            scores = scores.float()
        flat = scores.detach().reshape(-1)  # [numel], a view of a contiguous score
        row_numel = flat.numel() // max(1, info.shape[0] if info.shape else 1)
        for place, block in enumerate(info.row_blocks):
            offset, d_out = block.start * row_numel, block.stop - block.start
            numel = d_out * row_numel
            # entries are trained one by one, which at the last one means all of them
            threshold, cost, is_structured = numel, numel, False
            if info.kind == "linear" and structured:
                sigma = (
                    LoraSpec.cost(rank, info.shape[1], d_out)
                    if structured == "lora"
                    else AdapterSpec.cost(rank, d_out)
                )
                # a matrix with fewer entries than the threshold can never reach it
                if -(-sigma // alpha) <= numel:
                    threshold, cost, is_structured = -(-sigma // alpha), sigma, True
            elif info.kind in ("bias", "norm") and len(info.shape) == 1:
                threshold = -(-numel // beta)
            segments.append(
                Segment(
                    name,
                    place,
                    flat[offset : offset + numel],
                    offset,
                    threshold,
                    cost,
                    is_structured,
                )
            )
    return segments


def _select(segments: Sequence[Segment], budget: int) -> tuple[list[Tensor], list[int]]:
    """The shortest prefix of the ranking whose `min(count, threshold)` sum to `budget`.

    Under the paper's rule the threshold is the cost, so this spends the budget exactly.

    Returns:
        Per segment the selected positions, and how many they are.
    """
    positions = _top(segments, budget, [s.threshold for s in segments])
    return positions, [p.numel() for p in positions]


def _select_by_cost(segments: Sequence[Segment], budget: int) -> tuple[list[Tensor], list[int]]:
    """The shortest prefix of the ranking that costs the most that fits into `budget`.

    An entry costs 1 below its segment's threshold, the rest of the segment's cost at it, and
    nothing above it. So only the highest entries of each segment, up to its threshold, need to be
    walked, and where the threshold is out of reach, those among the `budget` highest of all.

    Returns:
        Per segment the selected positions up to its threshold, and how many are selected in all.
    """
    candidates = _walkable(segments, budget)
    device = candidates[0].device
    sizes = torch.tensor([p.numel() for p in candidates], device=device)
    values = torch.cat([s.scores[p] for s, p in zip(segments, candidates, strict=True)])
    ranking = torch.argsort(values, descending=True, stable=True)  # [n], ties in model order
    owner = torch.repeat_interleave(sizes)[ranking]  # [n] the segment of each entry
    grouped = torch.argsort(owner, stable=True)
    nth = torch.empty_like(owner)  # [n] 1 for the highest entry of its segment
    start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    nth[grouped] = torch.arange(1, owner.numel() + 1, device=device) - start
    threshold = torch.tensor([s.threshold for s in segments], device=device)[owner]
    cost = torch.tensor([s.cost for s in segments], device=device)[owner]
    total = torch.where(nth < threshold, 1, cost - nth + 1).cumsum(0)  # [n] of the prefix up to it

    length = int(torch.searchsorted(total, budget, right=True))
    if length == 0:
        raise ValueError(f"budget={budget} buys nothing: the first step costs {int(total[0])}")
    if length == total.numel() and int(total[-1]) < budget:
        raise _overspent(budget, int(total[-1]))
    taken = torch.zeros_like(owner, dtype=torch.bool)
    taken[ranking[:length]] = True
    positions = [p[t] for p, t in zip(candidates, taken.split(sizes.tolist()), strict=True)]
    last = int(owner[length - 1])
    return positions, _counts(segments, positions, last, values[ranking[length - 1]])


def _walkable(segments: Sequence[Segment], budget: int) -> list[Tensor]:
    """Positions per segment of the entries that can change what a prefix within `budget` costs."""
    positives = [int((s.scores > 0).sum()) for s in segments]
    bounded = [s.threshold < s.scores.numel() for s in segments]
    free = [m for m, is_bounded in enumerate(bounded) if not is_bounded]
    most = min(budget, sum(positives[m] for m in free))
    chosen = dict(zip(free, _top([segments[m] for m in free], most), strict=True))
    for m, segment in enumerate(segments):
        if bounded[m]:
            [chosen[m]] = _top([segment], min(segment.threshold, positives[m]))
    return [chosen[m] for m in range(len(segments))]


def _counts(
    segments: Sequence[Segment], positions: Sequence[Tensor], last: int, value: Tensor
) -> list[int]:
    """How many entries of each segment are ranked no lower than the `last` one taken."""
    counts = []
    for m, (segment, taken) in enumerate(zip(segments, positions, strict=True)):
        count = taken.numel()
        if count >= segment.threshold and m != last:
            # earlier segments win ties; the last segment itself has just reached its threshold
            scores = segment.scores
            count = int((scores >= value if m < last else scores > value).sum())
        counts.append(count)
    return counts


def _top(segments: Sequence[Segment], k: int, caps: Sequence[int] | None = None) -> list[Tensor]:
    names = [f"sensitivity[{s.name!r}]" for s in segments]
    return top_tau([s.scores for s in segments], k, caps, names=names)


def _assign(
    segments: Sequence[Segment],
    selected: Sequence[Tensor],
    counts: Sequence[int],
    sensitivity: Sensitivity,
) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, int]]]]:
    """Eq. 5: what is trained entry by entry, and which rows are structured."""
    parts: dict[str, list[Tensor]] = {}
    rows: dict[str, list[tuple[int, int]]] = {}
    for segment, positions, count in zip(segments, selected, counts, strict=True):
        if count == 0:
            continue
        if count < segment.threshold:
            parts.setdefault(segment.name, []).append(positions.cpu() + segment.offset)
        elif segment.structured:
            block = sensitivity.info[segment.name].row_blocks[segment.block]
            rows.setdefault(segment.name, []).append((block.start, block.stop))
        else:
            whole = torch.arange(segment.offset, segment.offset + segment.scores.numel())
            parts.setdefault(segment.name, []).append(whole)
    return {name: torch.cat(p) for name, p in parts.items()}, rows


def _is_valid(scores: Tensor) -> bool:
    return bool((torch.isfinite(scores) & (scores >= 0)).all())


def _overspent(budget: int, most: int) -> ValueError:
    return ValueError(
        f"budget={budget:,} is more than can be spent: at most {most:,} parameters, those with a "
        "sensitivity above 0, each structured matrix at the cost of its module"
    )


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
