"""The `Plan`: which entries of a model are trained, and which matrices get a LoRA or an Adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..files import checked_file
from ..files.json_kinds import (
    COUNT,
    COUNTS,
    NUMBER,
    OBJECT,
    RANGES,
    SHARE,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    Kinds,
    check,
    or_null,
)
from ..model import HeadSource, ParameterInfo, head_line
from ..model.head import head_source
from . import table
from .blocks import block_named, names_below
from .cell import Cell
from .specs import AdapterSpec, LoraSpec


@dataclass(frozen=True, eq=False)
class Plan:
    """What to train within a budget: the result of `allocate`, checked when made.

    Attributes:
        unstructured: parameter name -> sorted flat positions in the whole parameter, int64 `[nnz]`.
        structured: name of a matrix -> the LoRA or Adapter put on (some row ranges of) it. A name
            may be in both; its positions are then outside those rows.
        info: every candidate parameter.
        selected: parameter name -> number of sensitive parameters (Eq. 4) per row block.
        budget: most parameters that may be trained, head not counted.
        head: names of the head's parameters, trained whole in any case.
        model_name: the model that the scores were measured on, if known.
        rule: `"paper"` or `"published-code"`, as `allocate` has them, or `"placement"`: modules, or
            prompts, went where most sensitive parameters are; or the method of PEFT whose adapter
            was imported.
        kind: what structured tuning was asked for: `"lora"`, `"adapter"` or `None`.
        rank: the rank asked for.
        scale: the LoRA scale asked for.
        dropout: the LoRA dropout asked for.
        num_samples: how many samples the sensitivity was summed over; 0 if unknown.
        backbone_numel: parameters of the model without its head; 0 if unknown.
        head_source: where the head is known from, as `Sensitivity.head_source`.
        from_block: the block before which nothing is tuned; empty where all may be.
        forgone: the share of sensitivity that this costs: by how much the scores that the budget
            pays for are less in sum than those that it would pay for anywhere.
    """

    unstructured: Mapping[str, Tensor]
    structured: Mapping[str, LoraSpec | AdapterSpec]
    info: Mapping[str, ParameterInfo]
    selected: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    budget: int = -1
    head: tuple[str, ...] = ()
    model_name: str = ""
    rule: str = "paper"
    kind: str | None = None
    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    num_samples: int = 0
    backbone_numel: int = 0
    head_source: HeadSource = ""
    from_block: str = ""
    forgone: float = 0.0

    def __post_init__(self) -> None:
        for name in ("unstructured", "structured", "info", "selected"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "head", tuple(self.head))
        if self.budget == -1:
            object.__setattr__(self, "budget", self.num_trainable)
        _check(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # mapping proxies cannot be pickled, so a plan travels as plain dicts and is checked again
        values = (getattr(self, f.name) for f in fields(self))
        return Plan, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)

    def __eq__(self, other: object) -> bool:
        """Whether two plans say the same, in whatever order they name it."""
        if not isinstance(other, Plan):
            return NotImplemented
        mine, theirs = self.unstructured, other.unstructured
        return (
            all(
                getattr(self, f.name) == getattr(other, f.name)
                for f in fields(self)
                if f.name != "unstructured"
            )
            and mine.keys() == theirs.keys()
            and all(torch.equal(positions, theirs[name]) for name, positions in mine.items())
        )

    def __hash__(self) -> int:
        # positions are left out: equal plans have equal hashes all the same
        return hash((self.model_name, self.budget, self.kind, self.rank, tuple(sorted(self.info))))

    def __repr__(self) -> str:
        return (
            f"Plan(num_trainable={self.num_trainable}, budget={self.budget}, rule={self.rule!r}, "
            f"num_unstructured={self.num_unstructured}, num_structured={self.num_structured})"
        )

    @property
    def num_unstructured(self) -> int:
        """Parameters trained one by one."""
        return sum(positions.numel() for positions in self.unstructured.values())

    @property
    def num_structured(self) -> int:
        """Parameters of all LoRA and Adapter modules."""
        return sum(spec.num_parameters for spec in self.structured.values())

    @property
    def num_trainable(self) -> int:
        """All trained parameters but the head; never above `budget`."""
        return self.num_unstructured + self.num_structured

    @property
    def shortfall(self) -> str:
        """Why structured tuning was asked for and there is none, in words; empty where there is."""
        if self.kind is None or self.structured:
            return ""
        return (
            f"no matrix reaches what {table.KINDS[self.kind]} of rank {self.rank} costs: a smaller "
            "rank or a larger budget puts some"
        )

    def cells(self) -> dict[tuple[str, str], Cell]:
        """The plan by (block, operation), both in the order of the model, blocks by their numbers.

        Biases and norms are gathered under the operations `"bias"` and `"norm"`, whatever they
        belong to.
        """
        cells: dict[tuple[str, str], Cell] = {}
        for name, info in self.info.items():
            row_numel = info.numel // _rows(info)
            positions = self.unstructured.get(name)
            spec = self.structured.get(name)
            counts = self.selected.get(name, (0,) * len(info.row_blocks))
            for block, selected in zip(info.row_blocks, counts, strict=True):
                unstructured = structured = 0
                if positions is not None:
                    ends = positions.new_tensor([block.start * row_numel, block.stop * row_numel])
                    first, last = torch.searchsorted(positions, ends).tolist()
                    unstructured = last - first
                if spec is not None:
                    inside = [r for r in spec.rows if block.start <= r[0] and r[1] <= block.stop]
                    structured = _with_rows(spec, inside).num_parameters
                operation = info.kind if info.kind in ("bias", "norm") else block.operation
                numel = (block.stop - block.start) * row_numel
                cell = Cell(numel, selected, unstructured, structured)
                key = (info.block, operation)
                cells[key] = cells.get(key, Cell()) + cell
        # names that come from a file, or from a dict of one's own, may be in another order
        places = {b: i for i, b in enumerate(table.in_numeric_order(b for b, _ in cells))}
        return dict(sorted(cells.items(), key=lambda item: places[item[0][0]]))

    def summary(self, width: int = table.WIDTH) -> str:
        """An aligned text table: trained parameters by block and by operation.

        Args:
            width: most characters of a line; a wider table is broken into several.
        """
        lines = [part for line in _title(self) for part in table.wrapped(line, 12, width)]
        lines += ["", *table.wrapped("trained parameters by block and operation", 0, width)]
        return "\n".join([*lines, *table.render(self.cells(), self.kind, width)])

    def to_json(self) -> dict[str, Any]:
        """Everything but the positions, ready for `json.dumps`."""
        document: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in _MAPPINGS
        }
        if not self.from_block:  # older versions read what tells no more than they know
            del document["from_block"], document["forgone"]
        document["head"] = list(self.head)
        document["structured"] = {
            name: {**asdict(spec), "rows": [list(rows) for rows in spec.rows]}
            for name, spec in self.structured.items()
        }
        document["info"] = {name: info.to_json() for name, info in self.info.items()}
        document["selected"] = {name: list(counts) for name, counts in self.selected.items()}
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], unstructured: Mapping[str, Tensor]) -> Plan:
        """The plan that `to_json` described; `ValueError` if it and the positions do not fit."""
        values = dict(document)
        check(document, _JSON)
        try:
            values["structured"] = {n: _spec(n, d) for n, d in document["structured"].items()}
            values["head_source"] = head_source(document.get("head_source", ""))  # not in old files
            values["info"] = {n: ParameterInfo.from_json(d) for n, d in document["info"].items()}
            check(document["selected"], dict.fromkeys(document["selected"], COUNTS), "selected.")
            values["selected"] = {n: tuple(c) for n, c in document["selected"].items()}
            # in the order of the model, which a file of tensors does not keep
            in_order = {n: unstructured[n] for n in document["info"] if n in unstructured}
            positions = {n: p.to(torch.int64) for n, p in (in_order | dict(unstructured)).items()}
            return cls(positions, **values)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not the description of a plan: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {
            # int32 holds every position of a parameter below 2^31 elements, at half the size
            name: positions.to(torch.int32 if self.info[name].numel < 2**31 else torch.int64)
            for name, positions in self.unstructured.items()
        }
        checked_file.write(path, "plan", self.to_json(), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote; `DeltaFormatError` if anything in it is not as it should be."""
        return checked_file.read(path, "plan", cls.from_json)


def _title(plan: Plan) -> list[str]:
    kind = f"{table.KINDS[plan.kind]} of rank {plan.rank}" if plan.kind else "no structured tuning"
    samples = f", {table.count(plan.num_samples, 'sample')}" if plan.num_samples else ""
    lines = [f"plan        {plan.model_name or 'model unnamed'}: rule {plan.rule}, {kind}{samples}"]
    of_all = ""
    if plan.backbone_numel:
        of_all = f", {table.percent(plan.num_trainable, plan.backbone_numel)} of the backbone"
    lines.append(f"trained     {plan.num_trainable:,} of a budget of {plan.budget:,}{of_all}")
    matrices = sum(len(spec.rows) for spec in plan.structured.values())
    if plan.from_block:
        lines.append(
            f"from        {plan.from_block} on, nothing before it: "
            f"{table.percent_of(plan.forgone)} forgone of the sensitivity that this budget "
            "captures anywhere"
        )
    lines.append(f"structured  {plan.num_structured:,} in {table.count(matrices, 'module')}")
    if plan.shortfall:
        lines.append(f"            {plan.shortfall}")
    touched = sum(positions.numel() > 0 for positions in plan.unstructured.values())
    lines.append(
        f"single      {plan.num_unstructured:,} in {table.count(touched, 'parameter tensor')}"
    )
    lines.append(f"head        {head_line(plan.head, plan.head_source, plan.info)}")
    return lines


_MAPPINGS = ("unstructured", "structured", "info", "selected")
_KIND = Kind(f"one of {', '.join(table.KINDS)}", lambda value: value in list(table.KINDS))
_JSON: Kinds = {  # of a file
    "budget": COUNT,
    "head": TEXTS,
    "model_name": TEXT,
    "rule": TEXT,
    "kind": or_null(_KIND),
    "rank": COUNT,
    "scale": NUMBER,
    "dropout": SHARE,
    "num_samples": COUNT,
    "backbone_numel": COUNT,
    "from_block": TEXT,
    "forgone": SHARE,
    "structured": OBJECT,
    "info": OBJECT,
    "selected": OBJECT,
}
_SPEC: Kinds = {
    "rank": SIZE,
    "rows": RANGES,
    "in_features": SIZE,
    "scale": NUMBER,
    "dropout": SHARE,
}


def _rows(info: ParameterInfo) -> int:
    return max(1, info.shape[0]) if info.shape else 1


def _with_rows(spec: LoraSpec | AdapterSpec, rows: list[tuple[int, int]]) -> LoraSpec | AdapterSpec:
    if isinstance(spec, LoraSpec):
        return LoraSpec(spec.rank, tuple(rows), spec.in_features, spec.scale, spec.dropout)
    return AdapterSpec(spec.rank, tuple(rows))


def _spec(name: str, document: Mapping[str, Any]) -> LoraSpec | AdapterSpec:
    check(document, _SPEC, f"structured.{name}.")
    values = {**document, "rows": tuple((start, stop) for start, stop in document["rows"])}
    return LoraSpec(**values) if "in_features" in values else AdapterSpec(**values)


def _check(plan: Plan) -> None:
    for field_name in ("unstructured", "structured", "selected"):
        unknown = sorted(set(getattr(plan, field_name)) - set(plan.info))
        if unknown:
            raise ValueError(f"{field_name}: {unknown[0]!r} is not among the candidates in info")
    for name, positions in plan.unstructured.items():
        _check_positions(name, positions, plan.info[name].numel)
    for name, spec in plan.structured.items():
        _check_spec(name, spec, plan.info[name])
        positions = plan.unstructured.get(name, torch.empty(0, dtype=torch.int64, device="cpu"))
        row = positions // plan.info[name].shape[1]
        if any(bool(((row >= start) & (row < stop)).any()) for start, stop in spec.rows):
            raise ValueError(f"unstructured[{name!r}] has positions in rows that are structured")
    for name, counts in plan.selected.items():
        if len(counts) != len(plan.info[name].row_blocks):
            raise ValueError(
                f"selected[{name!r}] must hold {len(plan.info[name].row_blocks)} counts, one per "
                f"row block, got {len(counts)}"
            )
    if not 0 <= plan.forgone <= 1:
        raise ValueError(f"forgone must be a share from 0 to 1, got {plan.forgone}")
    if plan.from_block:
        below = names_below(plan.info, block_named(plan.info, plan.from_block))
        early = next((n for n in (*plan.unstructured, *plan.structured) if n in below), None)
        if early is not None:
            raise ValueError(f"from_block: {early!r} lies before {plan.from_block}, and is tuned")
    if plan.num_trainable > plan.budget:
        raise ValueError(f"the plan trains {plan.num_trainable}, above its budget {plan.budget}")


def _check_positions(name: str, positions: Tensor, numel: int) -> None:
    if positions.dtype != torch.int64 or positions.ndim != 1 or positions.device.type != "cpu":
        raise ValueError(
            f"unstructured[{name!r}] must be a 1-D int64 CPU tensor, got {positions.ndim}-D "
            f"{positions.dtype} on {positions.device}"
        )
    if positions.numel() == 0:
        return
    if bool((positions[1:] <= positions[:-1]).any()):
        raise ValueError(f"unstructured[{name!r}] must be sorted and without duplicates")
    low, high = int(positions[0]), int(positions[-1])
    if low < 0 or high >= numel:
        raise ValueError(f"unstructured[{name!r}] must lie in [0, {numel}), got {low} to {high}")


def _check_spec(name: str, spec: LoraSpec | AdapterSpec, info: ParameterInfo) -> None:
    if not info.takes_modules:
        raise ValueError(
            f"structured[{name!r}] must be the weight of a linear layer or of a 1×1 convolution: "
            f"{info.kind}"
        )
    if spec.rank < 1:
        raise ValueError(f"structured[{name!r}] must have a rank of at least 1, got {spec.rank}")
    if isinstance(spec, LoraSpec) and spec.in_features != info.shape[1]:
        raise ValueError(
            f"structured[{name!r}] has in_features {spec.in_features}, the matrix {info.shape[1]}"
        )
    last = 0
    for start, stop in spec.rows:
        if not last <= start < stop <= info.shape[0]:
            raise ValueError(
                f"structured[{name!r}] rows must be ascending, apart, and within "
                f"[0, {info.shape[0]}], got {spec.rows}"
            )
        last = stop
    if not spec.rows:
        raise ValueError(f"structured[{name!r}] has no rows")
