"""The task file: a `TaskFile` and its bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...files import checked_file
from ...files.atomic import write_atomically
from ...plan import AdapterSpec, LoraSpec, Plan
from .fingerprint import Fingerprint
from .metadata import as_json, check_classes
from .positions import decode_positions, encode_positions


@dataclass(frozen=True, eq=False)
class TaskFile:
    """One task: everything that turns a base model into the tuned one. Checked when made.

    Attributes:
        model_name: the base model, for people to read.
        plan: what was trained; its `unstructured` are the positions of the `values`.
        base: name of every touched tensor -> fingerprint of that tensor in the base model.
        values: parameter name -> trained deltas, `[nnz]` at the plan's positions.
        structured: matrix name -> local name -> trained tensor of its LoRA or Adapter, as
            `structured_shapes` names them.
        dense: parameter name -> a tensor that was trained whole: the head, and what else was.
        buffers: buffer name -> what forwards in training have made of it, such as running
            statistics and their counters; what they left as it was is not there. Files of format
            version 2 have the floating ones among `dense`.
        metadata: what whoever saved it had to say, as `as_json` describes it.
        recast: name -> fingerprint of a tensor of `base` in the dtype that the model had been given
            when it was saved, where that is another; it fits such a base as well.
        tied: name in `dense` -> the other names of that parameter, if there were any.
    """

    model_name: str
    plan: Plan
    base: Mapping[str, Fingerprint]
    values: Mapping[str, Tensor]
    structured: Mapping[str, Mapping[str, Tensor]]
    dense: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    recast: Mapping[str, Fingerprint] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", as_json(self.metadata))
        for each in fields(self)[2:]:  # all but the name of the model and the plan
            object.__setattr__(self, each.name, MappingProxyType(dict(getattr(self, each.name))))
        _check(self)

    @property
    def beside_head(self) -> frozenset[str]:
        """Names of what a module of the head may have besides, which then is the base's own."""
        return frozenset({*self.plan.info, *self.base}.difference(self.plan.head))


def structured_shapes(spec: LoraSpec | AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Local name -> shape of each trained tensor of a LoRA or an Adapter, slices stacked."""
    stacked, rows = len(spec.rows) * spec.rank, sum(stop - start for start, stop in spec.rows)
    if isinstance(spec, LoraSpec):
        return {"lora_a": (stacked, spec.in_features), "lora_b": (rows, spec.rank)}
    return {
        "down_weight": (spec.rank, rows),
        "down_bias": (stacked,),
        "up_weight": (rows, spec.rank),
        "up_bias": (rows,),
    }


def encode(task: TaskFile) -> bytes:
    """Bytes of a task file. The same task gives the same bytes."""
    document: dict[str, Any] = {
        "model_name": task.model_name,
        "base": {name: task.base[name].to_json() for name in sorted(task.base)},
        "plan": task.plan.to_json(),  # in the order of the model, which its tables follow
    }
    if task.recast:
        document["recast"] = {name: task.recast[name].to_json() for name in sorted(task.recast)}
    if task.tied:
        document["tied"] = {name: list(task.tied[name]) for name in sorted(task.tied)}
    if task.metadata:
        document["metadata"] = dict(task.metadata)
    tensors: dict[str, Tensor] = {f"dense/{name}": tensor for name, tensor in task.dense.items()}
    tensors |= {f"buffers/{name}": tensor for name, tensor in task.buffers.items()}
    for name, values in task.values.items():
        tensors[f"unstructured/{name}/values"] = values
        tensors[f"unstructured/{name}/positions"] = encode_positions(task.plan.unstructured[name])
    for name, parts in task.structured.items():
        tensors |= {f"structured/{name}/{local}": part for local, part in parts.items()}
    return checked_file.encode("task", document, tensors)


def decode(file: bytes, source: str | os.PathLike[str] = "file") -> TaskFile:
    """The task in `file`, with everything checked that can be without a model.

    Args:
        file: all bytes of the file.
        source: what the file is called in messages.

    Raises:
        DeltaFormatError: the file is another kind of file, cut, damaged, of a newer format, or
            holds something that must not be loaded.
    """
    return checked_file.decode(file, "task", source, _decode)


def read(path: str | os.PathLike[str]) -> TaskFile:
    """The task in the file at `path`; errors as `decode`, and `OSError` if it cannot be read."""
    return checked_file.read(path, "task", _decode)


def write(task: TaskFile, path: str | os.PathLike[str]) -> int:
    """Put the task at `path`, whole or not at all, and return the number of bytes."""
    file = encode(task)
    write_atomically(path, file)
    return len(file)


def _decode(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TaskFile:
    for key, kind in {"base": dict, "model_name": str, "plan": dict}.items():
        if not isinstance(document[key], kind):
            raise ValueError(f"{key}: expected a {kind.__name__}, got {document[key]!r:.80}")
    metadata, recast, tied = (document.get(key, {}) for key in ("metadata", "recast", "tied"))
    for key, value in {"metadata": metadata, "recast": recast, "tied": tied}.items():
        if not isinstance(value, dict):
            raise ValueError(f"{key}: expected a dict, got {value!r:.80}")
    for name, others in tied.items():
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise ValueError(f"tied: expected a list of names of {name}, got {others!r:.80}")
    dense: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    encoded: dict[str, Tensor] = {}
    structured: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, rest = key.partition("/")
        name, _, local = rest.rpartition("/")
        if group == "dense" and rest:
            dense[rest] = tensor
        elif group == "buffers" and rest:
            buffers[rest] = tensor
        elif group == "structured" and name:
            structured.setdefault(name, {})[local] = tensor
        elif group == "unstructured" and local == "values":
            values[name] = tensor
        elif group == "unstructured" and local == "positions" and tensor.dtype == torch.uint8:
            encoded[name] = tensor
        else:
            raise ValueError(f"unexpected tensor {key!r} of {tensor.dtype}")
    if encoded.keys() != values.keys():
        lacking = min(encoded.keys() ^ values.keys())
        raise ValueError(f"unstructured/{lacking} lacks its positions or its values")

    plan = _decode_plan(document["plan"], encoded, values)
    base, cast = (
        {name: Fingerprint.from_json(entry) for name, entry in entries.items()}
        for entries in (document["base"], recast)
    )
    return TaskFile(
        model_name=document["model_name"],
        plan=plan,
        base=base,
        values=values,
        structured=structured,
        dense=dense,
        buffers=buffers,
        metadata=metadata,
        recast=cast,
        tied={name: tuple(others) for name, others in tied.items()},
    )


def _decode_plan(
    document: Mapping[str, Any], encoded: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Plan:
    info = document.get("info")
    if not isinstance(info, dict) or not encoded.keys() <= info.keys():
        raise ValueError("the plan does not describe every parameter that the file trains")
    positions: dict[str, Tensor] = {}
    for name in (name for name in info if name in encoded):
        try:
            numel = _numel(info[name])
            positions[name] = decode_positions(encoded[name], values[name].numel(), numel)
        except ValueError as error:
            raise ValueError(f"unstructured/{name}/positions: {error}") from error
    return Plan.from_json(document, positions)


def _numel(info: object) -> int:
    shape = info.get("shape") if isinstance(info, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"expected a shape, got {shape!r:.80}")
    return math.prod(shape)


def _check(task: TaskFile) -> None:
    plan = task.plan
    if task.values.keys() != plan.unstructured.keys():
        name = min(task.values.keys() ^ plan.unstructured.keys())
        raise ValueError(f"{name}: positions without values, or values without positions")
    if task.structured.keys() != plan.structured.keys():
        name = min(task.structured.keys() ^ plan.structured.keys())
        raise ValueError(f"{name}: a structured module without tensors, or tensors without one")
    missing = sorted(set(plan.head) - task.dense.keys())
    if missing:
        raise ValueError(f"{missing[0]}: a parameter of the head is missing")
    for name in sorted({*plan.unstructured, *plan.structured}):
        if name not in task.base:
            raise ValueError(f"{name}: the fingerprint of its base weight is missing")
        if task.base[name].shape != tuple(plan.info[name].shape):
            raise ValueError(
                f"{name}: the fingerprint is of shape {list(task.base[name].shape)}, the plan "
                f"says {list(plan.info[name].shape)}"
            )
    for name, fingerprint in task.recast.items():
        if name not in task.base or task.base[name].shape != fingerprint.shape:
            raise ValueError(f"{name}: a fingerprint in another dtype of what is not in the base")
    for name in task.tied:
        if name not in task.dense:
            raise ValueError(f"{name} has other names, and is not trained whole")
    for name, values in task.values.items():
        shape = (plan.unstructured[name].numel(),)
        _check_tensor(f"unstructured/{name}/values", values, shape)
    for name, parts in task.structured.items():
        spec = plan.structured[name]
        _check_spec(name, spec)
        shapes = structured_shapes(spec)
        if parts.keys() != shapes.keys():
            raise ValueError(f"structured/{name}: expected {sorted(shapes)}, got {sorted(parts)}")
        for local, part in parts.items():
            _check_tensor(f"structured/{name}/{local}", part, shapes[local])
    for name, tensor in task.dense.items():
        _check_tensor(f"dense/{name}", tensor, tuple(tensor.shape))
    for name, tensor in task.buffers.items():
        if name in task.dense:
            raise ValueError(f"{name} is there as a parameter and as a buffer")
        if tensor.is_floating_point():
            _check_tensor(f"buffers/{name}", tensor, tuple(tensor.shape))
    head = [task.dense[name] for name in plan.head]
    check_classes(task.metadata, [len(tensor) for tensor in head if tensor.ndim])


def _check_spec(name: str, spec: LoraSpec | AdapterSpec) -> None:
    # Plan checks what it computes with; these reach the layers as they are
    if type(spec.rank) is not int:
        raise ValueError(f"structured/{name}: rank must be an integer, got {spec.rank!r}")
    if isinstance(spec, LoraSpec):
        numbers = isinstance(spec.scale, (int, float)) and isinstance(spec.dropout, (int, float))
        if not numbers or not math.isfinite(spec.scale) or not 0 <= spec.dropout <= 1:
            raise ValueError(
                f"structured/{name}: scale must be finite and dropout in [0, 1], got "
                f"{spec.scale!r} and {spec.dropout!r}"
            )


def _check_tensor(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{key}: expected floating-point values, got {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{key}: holds NaN or infinite values")
