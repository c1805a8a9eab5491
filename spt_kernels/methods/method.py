"""What a user may choose to train: the list of methods, and one of them with its options."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .noah_architecture import NoahArchitecture

if TYPE_CHECKING:
    from ..plan import Plan

DEFAULT_BUDGET = 0.005  # the paper's 0.4M parameters are 0.5 % of ViT-B/16
DEFAULT_RANK = 8

_BY_SCORES = frozenset({"budget", "samples", "from_block"})
_BY_ENTRIES = _BY_SCORES | {"rule"}
_OF_MODULES = frozenset({"rank", "scale", "dropout"})
_SPT_ADAPTER = _BY_ENTRIES | {"rank"}
_SPT_LORA = _BY_ENTRIES | _OF_MODULES
_BUDGET = frozenset({"budget"})
_SEARCH = frozenset({"budget", "dropout", "supernet_epochs", "generations", "population"})
_NOTHING: frozenset[str] = frozenset()
_ENTRIES = frozenset({"entries"})
_LORA, _ADAPTER = frozenset({"lora"}), frozenset({"adapter"})

# by the type of a field's default
_EXPECTED = {int: "a whole number", float: "a number", str: "a word"}

PLACEMENT = "placement"  # the rule of plans whose modules or prompts go where scores crowd


@dataclass(frozen=True)
class Entry:
    """What is known of a method before torch is loaded.

    Attributes:
        home: the file in this folder that holds it.
        options: the fields of `Method` that it reads.
        holds: what is in a plan of it: `"entries"`, or none of them, and a module on matrices; None
            where it takes no plan.
        is_baseline: whether it is another's work, or another's way, and here to compare with.
        table_size: what stands for the `K` of its name in tables of all methods.
    """

    home: str
    options: frozenset[str] = frozenset()
    holds: frozenset[str] | None = None
    is_baseline: bool = False
    table_size: int = 16

    @property
    def structured(self) -> str | None:
        """The kind of module on matrices, `"lora"` or `"adapter"`."""
        return next(iter((self.holds or _NOTHING) - _ENTRIES), None)

    def may_make(self, plan: Plan) -> bool:
        """Whether a plan may be one of this method."""
        holds = (_ENTRIES if plan.unstructured else _NOTHING) | ({plan.kind} - {None})
        return self.holds is not None and holds <= self.holds <= holds | _ENTRIES


# Every way to fine-tune there is, in the order of tables. K stands for a number.
METHODS: Mapping[str, Entry] = MappingProxyType(
    {
        "full": Entry("full"),
        "linear": Entry("linear", holds=_NOTHING),
        "bias": Entry("bias", holds=_ENTRIES),
        "partial-K": Entry("last_blocks", table_size=1),
        "mlp-K": Entry("mlp", table_size=3),
        "prompt-shallow": Entry("prompt_shallow", _BUDGET),
        "prompt-deep": Entry("prompt_deep", _BUDGET),
        "adapter-K": Entry("adapter", holds=_ADAPTER, table_size=8),
        "lora": Entry("lora", _SPT_LORA - {"samples", "rule"}, _LORA),
        "lora-K": Entry("plain_lora"),
        "adaptformer": Entry("adaptformer", frozenset({"rank"})),
        "noah": Entry("noah", _SEARCH | {"architecture"}),
        "spt-lora-structured": Entry("spt", _SPT_LORA, _LORA),
        "spt-lora": Entry("spt", _SPT_LORA, _LORA | _ENTRIES),
        "spt-adapter-structured": Entry("spt", _SPT_ADAPTER, _ADAPTER),
        "spt-adapter": Entry("spt", _SPT_ADAPTER, _ADAPTER | _ENTRIES),
        "spt-unstructured": Entry("spt", _BY_ENTRIES, _ENTRIES),
        "spt-prompt": Entry("spt_prompt", _BY_SCORES, _NOTHING),
        "sensitive-adapter-K": Entry("sensitive", _BY_SCORES, _ADAPTER, table_size=32),
        "sensitive-lora-K": Entry("sensitive", _BY_SCORES | {"scale", "dropout"}, _LORA),
        "dense-gradient": Entry("dense_gradient", _BY_ENTRIES, _ENTRIES, is_baseline=True),
        "published-layer": Entry("published_layer", _BY_ENTRIES, _ENTRIES, is_baseline=True),
        "peft-lora-K": Entry("peft_lora", is_baseline=True),
        "peft-lora-all": Entry("peft_lora", _BUDGET, is_baseline=True),
        "peft-shira": Entry("peft_shira", _BUDGET, is_baseline=True),
        "peft-super-tuning": Entry("peft_super_tuning", _BUDGET, is_baseline=True),
    }
)


@dataclass(frozen=True)
class Method:
    """What is trained beside the head.

    Attributes:
        name: one of `METHODS`, with a number in place of `K`.
        budget: parameters (int) or share of the backbone (float below 1); `None` is 0.5 %, and for
            `noah` its authors' 0.64M of ViT-B/16, that is 0.75 %.
        rank: rank of LoRA and Adapter modules, or width of AdaptFormer's. `None` is 8, for
            `adaptformer` 64, and for `lora` with a budget the largest rank that fits it.
        samples: training images whose gradients are measured (the paper's C).
        rule: `"paper"` or `"published-code"`, see `spt_kernels.allocate`.
        scale: LoRA's factor.
        dropout: LoRA's dropout, and of all modules of `noah`.
        head: what is trained whole besides, as `measure_sensitivity` has it: names or patterns,
            `()` or `"none"`. `None` is what the sensitivity found; without one, by name.
        supernet_epochs: of `noah`, on the training images before it searches.
        generations: of its search, after the first.
        population: architectures of a generation, each tried on the validation images.
        architecture: trained as it is, without a search; `NoahArchitecture` or its JSON values.
        from_block: the block before which nothing is tuned, see `spt_kernels.allocate`.

    `METHODS` says which of these a method reads; one that it does not is refused.
    """

    name: str = "spt-lora"
    budget: int | float | None = None
    rank: int | None = None
    samples: int = 800
    rule: str = "paper"
    scale: float = 1.0
    dropout: float = 0.1
    head: str | tuple[str, ...] | None = None
    supernet_epochs: int = 500
    generations: int = 15
    population: int = 50
    architecture: NoahArchitecture | None = None
    from_block: int | str | None = None

    def __post_init__(self) -> None:
        options = self.entry.options
        check_none_is_lacking(self)
        if self.head is not None and not isinstance(self.head, str):
            object.__setattr__(self, "head", _patterns(self.head))
        if self.architecture is not None and not isinstance(self.architecture, NoahArchitecture):
            made = NoahArchitecture.from_json(self.architecture)
            object.__setattr__(self, "architecture", made)
        for option in fields(self)[1:]:
            if option.name == "head":
                continue  # which every method has
            if option.name not in options and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name}: method {self.name!r} has none; leave it out")
        for name in ("budget", "scale", "dropout"):
            check_number(name, getattr(self, name), int, float)
        whole = ("rank", "samples", "supernet_epochs", "generations", "population")
        for name in whole:
            check_number(name, getattr(self, name), int)
        is_share = isinstance(self.budget, float)
        if self.budget is not None and not 0 < self.budget < (1 if is_share else math.inf):
            raise ValueError(
                "budget: expected a whole number of parameters, or a share of the backbone below "
                f"1, got {self.budget}"
            )
        for name in whole:
            check_positive(name, getattr(self, name))
        check_within("dropout", self.dropout, 0.0, 1.0)
        if not isinstance(self.from_block, str):
            check_number("from_block", self.from_block, int)
        if self.rule not in ("paper", "published-code"):
            raise ValueError(f"rule: expected paper or published-code, got {self.rule!r}")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Method:
        """What `asdict` made of a method, now or in an older version; errors as the class.

        An option of modules that a method without such took once, and that did nothing, is left
        out.
        """
        read = entry_of(value.get("name", cls.name)).options
        return cls(
            **{name: v for name, v in value.items() if name in read or name not in _OF_MODULES}
        )

    @property
    def entry(self) -> Entry:
        """Its entry in `METHODS`."""
        return entry_of(self.name)

    @property
    def size(self) -> int:
        """The number in its name."""
        return int(self.name.rpartition("-")[2])

    @property
    def is_sensitivity_aware(self) -> bool:
        """Whether it chooses by a `Sensitivity`."""
        return "samples" in self.entry.options

    def head_with(self, plan: Plan | None) -> str | tuple[str, ...] | None:
        """The head that is trained: the plan's, where that has decided, or else its own."""
        is_decided = plan is not None and (plan.head or plan.head_source)
        return plan.head if plan is not None and is_decided else self.head

    @property
    def budget_or_default(self) -> int | float:
        """Its budget, the paper's where none was given."""
        return DEFAULT_BUDGET if self.budget is None else self.budget

    @property
    def is_searched(self) -> bool:
        """Whether what it trains is still to be searched for."""
        return "architecture" in self.entry.options and self.architecture is None

    def count(self, backbone: int) -> int:
        """Its budget as a number of parameters of a backbone of so many."""
        budget = self.budget_or_default
        if budget > backbone:
            raise ValueError(f"budget: the backbone has {backbone:,} parameters, got {budget:,}")
        return int(budget * backbone) if isinstance(budget, float) else budget


def entry_of(name: Any, known: Mapping[str, Entry] = METHODS) -> Entry:
    """The entry of the method called `name`, of those that are `known` where it is asked.

    Raises:
        ValueError: there is none.
    """
    family = re.sub(r"-[1-9]\d*$", "-K", name) if isinstance(name, str) else ""
    if family not in known or name.endswith("-K"):
        names, asked = ", ".join(known), str(name).lower().replace("_", "-")
        hint = did_you_mean(re.sub(r"\d+", "K", asked), known)
        raise ValueError(f"method: expected one of {names} (K is a number), got {name!r}{hint}")
    return known[family]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with what is written almost like `name`, if there is such."""
    close = difflib.get_close_matches(name, tuple(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def table_names() -> tuple[str, ...]:
    """One name of each method, in the order of tables: where one has a size, it is the paper's."""
    return tuple(family.replace("-K", f"-{entry.table_size}") for family, entry in METHODS.items())


def name_of(plan: Plan) -> str:
    """The method that makes such plans: `spt-…` where a sensitivity chose what is trained."""
    if plan.rule == PLACEMENT:
        return f"sensitive-{plan.kind}-{plan.rank}" if plan.structured else "spt-prompt"
    if plan.selected:
        # spt-lora spends its budget to the last parameter; without the entries some of it is left
        is_part = not plan.unstructured and plan.num_trainable < plan.budget
        return f"spt-{plan.kind or 'unstructured'}{'-structured' if is_part else ''}"
    if plan.structured and plan.unstructured:
        return f"spt-{plan.kind}"
    if plan.structured:
        ranks = [spec.rank for spec in plan.structured.values()]
        return f"adapter-{ranks[0]}" if plan.kind == "adapter" else "lora"
    if not plan.unstructured:
        return "linear"
    is_bias = all(
        plan.info[name].kind in ("bias", "norm")
        and name.endswith("bias")
        and positions.numel() == plan.info[name].numel
        for name, positions in plan.unstructured.items()
    )
    return "bias" if is_bias else "spt-unstructured"


def _patterns(head: Any) -> tuple[str, ...]:
    patterns = tuple(head) if isinstance(head, Iterable) else (head,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"head: expected names or patterns, got {head!r}")
    return patterns


def check_none_is_lacking(own: Any) -> None:
    """Refuse None for a field of a dataclass whose default is a number or a word; `TypeError`."""
    for f in fields(own):
        wanted = _EXPECTED.get(type(f.default))
        if wanted is not None and getattr(own, f.name) is None:
            raise TypeError(f"{f.name}: expected {wanted}, as {f.default!r}, got None")


def check_number(name: str, value: Any, *kinds: type) -> None:
    """Refuse what is no number of one of these kinds, a truth value above all; None is fine."""
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        wanted = "a number" if float in kinds else "a whole number"
        raise TypeError(f"{name}: expected {wanted}, got {value!r}")


def check_seed(value: Any) -> None:
    """Refuse what no generator can begin with."""
    check_number("seed", value, int)
    if not 0 <= value < 2**63:
        raise ValueError(f"seed: expected zero or more, and less than 2^63, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Refuse zero, less, and what is not finite."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected more than zero, got {value}")


def check_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse what is none of the names that there are."""
    names = tuple(known)
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r}")


def check_within(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse what is below `low`, or not below `high`."""
    if value is not None and not low <= value < high:
        raise ValueError(f"{name}: expected at least {low:g} and below {high:g}, got {value}")
