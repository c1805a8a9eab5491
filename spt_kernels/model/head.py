"""Which parameters of a model are its head, where that is told, or only names can tell it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

# A head as a user tells it: names or patterns; nothing at all, or "none", for none
HeadPatterns = str | Iterable[str]

# Where a head is known from: what the loss reads, the user, or names; "" where nobody has decided
HeadSource = Literal["", "loss", "given", "names"]

_MOST = 4  # names in a line
_ATTRIBUTES = frozenset({"head", "head_dist", "fc", "classifier", "heads"})
_OF_TRANSFORMERS = frozenset(
    {"score", "qa_outputs", "classification_head", "logits_proj"}
    | {"cls_classifier", "distillation_classifier", "classifier_distill"}
)


def head_names(model: nn.Module, head: HeadPatterns | None = None) -> tuple[str, ...]:
    """Name the parameters of the classifier head or heads, in the model's order.

    Without `head` it goes by names, for where no forward pass can be made to see which layers come
    last, as `measure_sensitivity` does: a timm model says itself which module is its head; any
    other has it in an attribute called `head`, `head_dist`, `fc`, `classifier` or `heads`, one of
    transformers also in what those call so (`score`, `qa_outputs`, ...). Empty when there is none.

    Args:
        model: any module.
        head: names of parameters or modules, or shell-style patterns of them; `()` or `"none"` for
            no head. What several modules share is named once, whichever of its names is given.

    Raises:
        TypeError: `head` is no string and no sequence of strings.
        ValueError: one of them matches nothing.
    """
    if head is not None:
        every = dict(model.named_parameters(remove_duplicate=False))
        found = {id(every[name]) for name in matching_head(every, head)}
        return tuple(name for name, parameter in model.named_parameters() if id(parameter) in found)
    heads: list[nn.Module] = []
    for host in _timm_models(model):
        heads += _timm_heads(host)
    if not is_timm(model):
        is_of_transformers = any(
            kind.__module__.startswith("transformers.") for kind in type(model).__mro__
        )
        known = _ATTRIBUTES | _OF_TRANSFORMERS if is_of_transformers else _ATTRIBUTES
        heads += [module for name, module in model.named_children() if name in known]
    inside = {id(parameter) for head in heads for parameter in head.parameters()}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in inside)


def vocabulary_names(model: nn.Module) -> frozenset[str]:
    """Name what a language model makes its words of, as its `get_output_embeddings` tells.

    It comes last before the loss and is no head of a task: the pre-trained model has it already,
    often as the very table that it reads words by.
    """
    inside: set[int] = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        words = get() if callable(get) else None
        if isinstance(words, nn.Module):
            inside |= {id(parameter) for parameter in words.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) in inside)


def matching_head(names: Collection[str], head: HeadPatterns) -> tuple[str, ...]:
    """Those of `names` that a head as it is told means, in their order; errors as `head_names`."""
    found: set[str] = set()
    for pattern in as_patterns(head):
        matched = matching_names(names, pattern)
        if not matched:
            raise ValueError(
                f"head: {pattern!r} matches no parameter and no module of the model; for a model "
                "without a head, give () or 'none'"
            )
        found.update(matched)
    return tuple(name for name in names if name in found)


def matching_names(names: Iterable[str], pattern: str) -> list[str]:
    """Parameters that a pattern means: by their own names, or that of a module around them."""
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]


def as_patterns(head: HeadPatterns) -> tuple[str, ...]:
    """A head as it is told, as patterns; `TypeError` where it is something else."""
    if isinstance(head, str):
        return () if head == "none" else (head,)
    patterns = tuple(head) if isinstance(head, Iterable) else (head,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"head: expected names or patterns, got {head!r}")
    return patterns


def head_source(value: Any) -> HeadSource:
    """A `HeadSource` as a file has it; `ValueError` when it is none."""
    if value not in get_args(HeadSource):
        raise ValueError(f"head_source: expected one of {get_args(HeadSource)}, got {value!r}")
    return value  # type: ignore[no-any-return]


def head_line(head: Sequence[str], source: HeadSource, others: Iterable[str] = ()) -> str:
    """In words what was taken for the head, or that nothing was.

    Args:
        head: names of its parameters.
        source: where it is known from.
        others: of parameters outside of it, by which to tell whole modules from parts.
    """
    if head:
        layers = layers_of(head)
        if len(layers) > _MOST:
            layers = parts_of(head, others)
        return f"{in_few_words(layers)} (trained whole, not in the budget)"
    if source == "":
        return "not decided: what its name says, when the plan is applied"
    found = {"given": "none, as asked for", "loss": "none found", "names": "none by name"}
    return f"{found[source]}: all that is trained is in the budget"


def layers_of(names: Iterable[str]) -> list[str]:
    """Parameters by the layer where both its weight and its bias are named, else as they are."""
    names = list(names)
    known = set(names)
    result: dict[str, None] = {}
    for name in names:
        layer, _, local = name.rpartition(".")
        is_whole = bool(layer) and {f"{layer}.weight", f"{layer}.bias"} <= known
        result[layer if is_whole and local in ("weight", "bias") else name] = None
    return list(result)


def parts_of(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Parameters by the largest modules of which all that is in `among` is named."""
    chosen = list(names)
    others = set(among).difference(chosen)
    spoilt = {prefix for name in others for prefix in _prefixes(name)}
    whole = (next((p for p in _prefixes(n) if p not in spoilt), n) for n in chosen)
    return list(dict.fromkeys(whole))


def _prefixes(name: str) -> list[str]:
    """The modules around a parameter, the largest first."""
    parts = name.split(".")
    return [".".join(parts[:stop]) for stop in range(1, len(parts))]


def in_few_words(names: Sequence[str], most: int = _MOST) -> str:
    """The first few names, for a line."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def is_timm(module: nn.Module) -> bool:
    """Whether a module is a timm model, or says of itself what those do."""
    return any(
        hasattr(module, name) for name in ("pretrained_cfg", "default_cfg", "get_classifier")
    )


def config_entry(model: nn.Module, key: str) -> tuple[str, ...]:
    """What a timm model's configuration has under `key`, if it has one."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return (value,) if isinstance(value, str) else tuple(value or ())


def _timm_models(model: nn.Module) -> Iterator[nn.Module]:
    # a timm model may be wrapped, as `backbone`
    for name, module in model.named_modules():
        if name.count(".") <= 1 and is_timm(module):
            yield module


def _timm_heads(model: nn.Module) -> list[nn.Module]:
    modules = dict(model.named_modules())
    named = [modules[name] for name in config_entry(model, "classifier") if name in modules]
    if named:
        return named
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else ()
    found = found.values() if isinstance(found, Mapping) else found
    found = [found] if isinstance(found, nn.Module) else found
    return [module for module in found or () if isinstance(module, nn.Module)]
