"""What a model says of its classes beside its head: how many they are and what they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_COUNTS = ("num_classes", "num_labels")  # timm and torchvision; transformers


@dataclass(frozen=True)
class Said:
    """One thing that a module said of its classes before.

    Attributes:
        module: its name.
        in_config: whether it is an attribute of the module's `config`.
        attribute: the name of what was changed.
        value: what it was.
    """

    module: str
    in_config: bool
    attribute: str
    value: Any


def set_class_labels(
    model: nn.Module, rows: Mapping[str, tuple[int, int]], names: Sequence[str] = ()
) -> tuple[Said, ...]:
    """Bring what a model says of its classes in step with its head.

    That is `num_classes`, `num_labels`, and in a `config` as of transformers `id2label`, `label2id`
    and, where one output became several or the reverse, `problem_type`. It is looked for in the
    modules around the head, and left alone where it counted something else than its outputs.

    Args:
        model: any.
        rows: name of a module of the head -> the rows its weight had, 0 for none, and has.
        names: of the classes, if they are known.

    Returns:
        What it was, for `restore_class_labels`.
    """
    said: list[Said] = []
    for name, host in _around(model, rows):
        inside = [pair for head, pair in rows.items() if _is_within(head, name)]
        for attribute in _COUNTS:
            count = vars(host).get(attribute)
            after = _one({new for old, new in inside if type(count) is int and old == count})
            if after is not None and after != count:
                said.append(Said(name, False, attribute, count))
                setattr(host, attribute, after)
        said += _set_config(name, getattr(host, "config", None), inside, names)
    return tuple(said)


def restore_class_labels(model: nn.Module, said: Sequence[Said]) -> None:
    """Let a model say what it said before."""
    for one in reversed(said):
        module = model.get_submodule(one.module)
        setattr(module.config if one.in_config else module, one.attribute, one.value)


def _set_config(
    name: str, config: Any, inside: list[tuple[int, int]], names: Sequence[str]
) -> list[Said]:
    labels = getattr(config, "id2label", None)
    if not isinstance(labels, Mapping) or not hasattr(config, "label2id"):
        return []
    before = len(labels)
    after = _one({new for old, new in inside if old == before})
    if after is None:
        return []
    named = list(names) if len(names) == after else []
    if not named and after == before:
        return []
    kept = {"id2label": labels, "label2id": config.label2id}
    if hasattr(config, "problem_type"):
        kept["problem_type"] = config.problem_type  # which its loss sets by the first target
        if after != before and 1 in (after, before):
            config.problem_type = None
    new = dict(enumerate(named or [f"LABEL_{i}" for i in range(after)]))  # as transformers does
    config.id2label, config.label2id = new, {label: i for i, label in new.items()}
    return [Said(name, True, attribute, value) for attribute, value in kept.items()]


def _around(model: nn.Module, heads: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that some of the heads are within, but for the heads."""
    for name, module in model.named_modules():
        if any(_is_within(head, name) for head in heads):
            yield name, module


def _is_within(head: str, name: str) -> bool:
    return head != name and (name == "" or head.startswith(f"{name}."))


def _one(values: set[int]) -> int | None:
    return values.pop() if len(values) == 1 else None
