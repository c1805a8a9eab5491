"""What a task file tells of itself beside its tensors: any JSON, some of it in a known form."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_DEPTH = 32  # of lists and objects within each other
_WORD = 2**63  # integers that other readers of JSON take


def as_json(metadata: Mapping[str, Any] | None) -> dict[str, Json]:
    """Metadata as it will be read again: a copy, tuples as lists, `{}` for None.

    Everything may be in it. Under these keys it must be as other commands read it, or absent:

    * `"classes"`: the names of the head's outputs, in their order; not empty, each once.
    * `"preprocessing"`: an object with `"size"` (the side of the square image in pixels, or
      `[height, width]`), `"mean"` and `"std"` (per channel, of values in 0 to 1) and
      `"interpolation"` (such as `"bicubic"`); more may be in it.
    * `"model"`: an object with `"name"` (of the architecture, such as timm's) and, as an object,
      its constructor's `"arguments"`, which may be left out; more may be in it.

    Raises:
        TypeError: something in it is not JSON; says where.
        ValueError: a number is not finite or an integer beyond 64 bits, it is nested too deeply, or
            what is under one of these keys is of another form.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping, got {type(metadata).__name__}")
    value = {name: _json(entry, f"metadata[{name!r}]", 1) for name, entry in _items(metadata)}
    for name, check in _KNOWN.items():
        if name in value:
            check(value[name], f"metadata[{name!r}]")
    return value


def check_classes(metadata: Mapping[str, Any], n_rows: Collection[int]) -> None:
    """Raise `ValueError` where there are names for another number of classes than of outputs.

    Args:
        metadata: of `as_json`.
        n_rows: of the tensors of the head, one of which makes its outputs; empty where unknown.
    """
    classes = metadata.get("classes")
    if classes is not None and n_rows and len(classes) not in n_rows:
        found = " or ".join(map(str, dict.fromkeys(n_rows)))
        raise ValueError(
            f"metadata['classes'] must name the {found} outputs of the head in their order, got "
            f"{len(classes)} names"
        )


def _json(value: Any, where: str, depth: int) -> Json:
    if depth > _DEPTH:
        raise ValueError(f"{where[:80]}… is nested in itself, or more than {_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if not -_WORD <= value < _WORD:
            raise ValueError(f"{where} must fit into 64 bits, got an integer that does not")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} must be finite, got {value}")
        return float(value)
    if isinstance(value, Mapping):
        items = _items(value, where)
        return {name: _json(entry, f"{where}[{name!r}]", depth + 1) for name, entry in items}
    if isinstance(value, (list, tuple)):
        return [_json(entry, f"{where}[{i}]", depth + 1) for i, entry in enumerate(value)]
    raise TypeError(
        f"{where} must be what JSON knows (None, bool, int, float, str, list, dict), got "
        f"{type(value).__name__}"
    )


def _items(value: Mapping[Any, Any], where: str = "metadata") -> list[tuple[str, Any]]:
    for name in value:
        if not isinstance(name, str):
            raise TypeError(f"{where} must have strings as keys, got {name!r:.80}")
    return [(str.__str__(name), entry) for name, entry in value.items()]


def _check_classes(value: Json, where: str) -> None:
    names = _list_of(value, where, str, "names")
    if not all(names):
        raise ValueError(f"{where} must name each class, got an empty name")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where} must name each class once, got {twice!r} more than once")


def _check_preprocessing(value: Json, where: str) -> None:
    form = _object(value, where, ("size", "mean", "std", "interpolation"))
    size = form["size"] if isinstance(form["size"], list) else [form["size"]] * 2
    if len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(
            f"{where}['size'] must be pixels or [height, width] in pixels, got {form['size']!r:.80}"
        )
    mean, std = (_list_of(form[k], f"{where}[{k!r}]", (int, float), "numbers") for k in _SCALES)
    if len(mean) != len(std) or not all(x > 0 for x in std):
        raise ValueError(
            f"{where}['std'] must be above zero for each of the {len(mean)} channels of 'mean', "
            f"got {std!r:.80}"
        )
    _check_name(form["interpolation"], f"{where}['interpolation']")


_SCALES = ("mean", "std")


def _check_model(value: Json, where: str) -> None:
    model = _object(value, where, ("name",))
    _check_name(model["name"], f"{where}['name']")
    if not isinstance(model.get("arguments", {}), dict):
        raise ValueError(
            f"{where}['arguments'] must be an object of the constructor's arguments, got "
            f"{model['arguments']!r:.80}"
        )


def _check_name(value: Json, where: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be a name, got {value!r:.80}")


def _object(value: Json, where: str, keys: tuple[str, ...]) -> dict[str, Json]:
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        got = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{where} must be an object with {', '.join(keys)}, got {got!r:.80}")
    return value


def _list_of(value: Json, where: str, kind: Any, plural: str) -> list[Any]:
    is_list = isinstance(value, list) and len(value) > 0
    if not is_list or not all(isinstance(x, kind) and type(x) is not bool for x in value):  # type: ignore[union-attr]
        raise ValueError(f"{where} must be a list of {plural}, got {value!r:.80}")
    return value  # type: ignore[return-value]


_KNOWN: dict[str, Callable[[Json, str], None]] = {
    "classes": _check_classes,
    "preprocessing": _check_preprocessing,
    "model": _check_model,
}
