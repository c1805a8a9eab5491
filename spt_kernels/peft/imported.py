"""PEFT's own sparse adapters, SHiRA and Super-Tuning, as tasks of this package."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn

from ..errors import BaseModelMismatch, DeltaFormatError
from ..model import describe
from ..model.quantized import logical_shape
from ..model.tied import identity_of
from ..plan import Plan
from ..task.base_model import BaseModel
from ..task.delta import load_task
from ..task.file.fingerprint import Fingerprint
from ..task.file.format import TaskFile
from .weights import BASE

_KINDS = {"SHIRA": "shira_weight", "SUPERTUNING": "supertuning_values"}  # what has the deltas


def import_adapter(
    model: nn.Module, source: str | os.PathLike[str], *, subfolder: str | None = None
) -> nn.Module:
    """Put an adapter that PEFT's SHiRA or Super-Tuning has saved onto its base model, in place.

    The model computes what PEFT's does, and is tuned as by `load_delta`: `save_delta` writes its
    task file, `merge` folds it in, and `get_peft_model(model, SptConfig())` hands it to PEFT.

    Args:
        model: the base model, plain.
        source: a folder that PEFT's `save_pretrained` wrote, or the name of one on the hub.
        subfolder: of that.

    Returns:
        The model.

    Raises:
        ValueError: there is no such adapter, or it is of another kind, or Super-Tuning's with a
            LoRA on the same matrices, or has trained one of several weights that are tied; the
            model is tuned already.
        DeltaFormatError: its tensors do not fit the model.
        BaseModelMismatch: the model lacks a layer, or has it in another shape, or with other values
            than the adapter comes with.
        OSError: a file of it cannot be read.
    """
    if hasattr(model, "spt_tuning"):
        raise ValueError("model: expected a plain one, got one that is tuned: unload it first")
    config: Any = PeftConfig.from_pretrained(os.fspath(source), subfolder=subfolder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _KINDS:
        raise ValueError(f"source: expected an adapter of {' or '.join(_KINDS)}, got one of {kind}")
    if getattr(config, "r", None) is not None and kind == "SUPERTUNING":
        raise ValueError(
            "source: expected r=None of Super-Tuning, got a LoRA on the matrices whose entries are "
            "trained as well, which no plan has: merge it by PEFT instead"
        )
    weights = load_peft_weights(os.fspath(source), device="cpu", subfolder=subfolder)
    tensors = {key.removeprefix(BASE): tensor for key, tensor in weights.items()}
    layers = [key.rpartition(".")[0] for key in tensors if key.endswith(f".{_KINDS[kind]}")]
    now = BaseModel.of(model)
    for layer in layers:
        _weight(layer, now.parameters)
    whole = _trained_whole(model, now, tensors, layers)
    read = _shira if kind == "SHIRA" else _super_tuning
    try:
        entries = {f"{layer}.weight": read(layer, tensors, now, config) for layer in layers}
        task = _task(model, now, entries, whole, kind)
    except KeyError as error:
        raise DeltaFormatError(f"{source}: the adapter lacks the tensor {error}") from error
    except ValueError as error:
        raise DeltaFormatError(f"{source}: the adapter is damaged: {error}") from error
    return load_task(model, task, os.fspath(source))


_Entries = tuple[Tensor, Tensor]  # flat positions and the deltas there, in whatever order


def _shira(layer: str, tensors: Mapping[str, Tensor], now: BaseModel, config: Any) -> _Entries:
    # [2, nnz], rows and columns; of a floating dtype where Windows saved them
    rows, columns = tensors[f"{layer}.shira_indices"].long()
    width = logical_shape(_weight(layer, now.parameters))[1]
    if not bool(((columns >= 0) & (columns < width)).all()):
        raise ValueError(f"{layer}.shira_indices: columns must lie in [0, {width})")
    return rows * width + columns, tensors[f"{layer}.shira_weight"]


def _super_tuning(
    layer: str, tensors: Mapping[str, Tensor], now: BaseModel, config: Any
) -> _Entries:
    values = tensors[f"{layer}.supertuning_values"]
    positions = tensors.get(f"{layer}.supertuning_indices")
    if positions is None:  # they are the largest, or smallest, of the base weight
        magnitudes = _weight(layer, now.parameters).detach().abs().flatten()
        positions = torch.topk(magnitudes, len(values), largest=config.select_top).indices
    return positions.cpu().long(), values


def _weight(layer: str, parameters: Mapping[str, Tensor]) -> Tensor:
    name = f"{layer}.weight"
    if name not in parameters or len(logical_shape(parameters[name])) != 2:
        raise BaseModelMismatch(f"source: the model has no matrix {name}, which the adapter trains")
    return parameters[name]


def _trained_whole(
    model: nn.Module, now: BaseModel, tensors: Mapping[str, Tensor], layers: Collection[str]
) -> dict[str, Tensor]:
    """Name -> what PEFT has saved of no layer with entries; of tied weights under one name."""
    found = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in layers}
    for layer in layers:  # of words PEFT saves the base weight as well
        for local, parameter in model.get_submodule(layer).named_parameters(recurse=False):
            base = found.pop(f"{layer}.base_layer.{local}", None)
            if base is not None and not torch.equal(base.to(parameter), parameter):
                raise BaseModelMismatch(
                    f"source: {layer}.{local} has other values than those the adapter was trained "
                    "on, which it comes with"
                )
    tied: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(identity_of(parameter), []).append(name)
    for first, *others in tied.values():
        given = [name for name in (first, *others) if name in found]
        for other in (first, *others):
            if given and not (other in found and torch.equal(found[other], found[given[0]])):
                raise ValueError(
                    f"source: it has trained {given[0]} apart from {other}, to which the model "
                    "ties it, so that no task can hold it: merge it by PEFT instead"
                )
        for other in others:
            found.pop(other, None)
    return found


def _task(
    model: nn.Module,
    now: BaseModel,
    entries: Mapping[str, _Entries],
    whole: Mapping[str, Tensor],
    kind: str,
) -> TaskFile:
    """Entries as a task, with what PEFT has trained whole."""
    if not entries:
        raise ValueError("it trains no entries")
    positions, values = {}, {}
    for name, (flat, deltas) in entries.items():
        if flat.shape != deltas.shape:
            raise ValueError(f"{name} has {len(flat)} positions and {len(deltas)} values")
        order = torch.argsort(flat)
        positions[name], values[name] = flat[order], deltas[order].float()
    dense = {name: tensor for name, tensor in whole.items() if name not in now.buffers}
    info = describe(model)
    plan = Plan(
        positions,
        {},
        {name: info[name] for name in positions},
        head=tuple(dense),
        head_source="given",
        model_name=type(model).__name__,
        rule=kind.lower(),
    )
    return TaskFile(
        plan.model_name,
        plan,
        Fingerprint.of_all(now.base_tensors(positions.keys())),
        values,
        {},
        dense,
        {name: tensor for name, tensor in whole.items() if name in now.buffers},
    )
