"""PEFT's own sparse adapters, SHiRA and Super-Tuning, as tasks of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn

from ..errors import BaseModelMismatch, DeltaFormatError
from ..model import describe
from ..plan import Plan
from ..task.base_model import BaseModel
from ..task.delta import load_task
from ..task.file.fingerprint import Fingerprint
from ..task.file.format import TaskFile
from .weights import BASE

_KINDS = ("SHIRA", "SUPERTUNING")


def import_adapter(
    model: nn.Module, source: str | os.PathLike[str], *, subfolder: str | None = None
) -> nn.Module:
    """Put an adapter that PEFT's SHiRA or Super-Tuning has saved onto its base model, in place.

    The model computes what PEFT's does, and is tuned as by `load_delta`: `save_delta` writes its
    task file, `merge` folds it in, and `get_peft_model(model, SptConfig())` hands it to PEFT.

    Args:
        model: the base model, plain; floating weights.
        source: a folder that PEFT's `save_pretrained` wrote, or the name of one on the hub.
        subfolder: of that.

    Returns:
        The model.

    Raises:
        ValueError: there is no such adapter, or it is of another kind, or Super-Tuning's with a
            LoRA on the same matrices; the model is tuned already.
        DeltaFormatError: its tensors do not fit the model.
        BaseModelMismatch: the model lacks a layer, or has it in another shape.
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
    read = _shira if kind == "SHIRA" else _super_tuning
    now = BaseModel.of(model)
    try:
        task = _task(model, now, read(tensors, now.parameters, config), tensors, kind)
    except BaseModelMismatch:
        raise
    except KeyError as error:
        raise DeltaFormatError(f"{source}: the adapter lacks the tensor {error}") from error
    except ValueError as error:
        raise DeltaFormatError(f"{source}: the adapter is damaged: {error}") from error
    return load_task(model, task, os.fspath(source))


# Name of a weight -> its flat positions and the deltas there, in whatever order
_Entries = dict[str, tuple[Tensor, Tensor]]


def _shira(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], config: Any
) -> _Entries:
    found = {}
    for layer, values in _of_layers(tensors, "shira_weight"):
        # [2, nnz], rows and columns; of a floating dtype where Windows saved them
        rows, columns = tensors[f"{layer}.shira_indices"].long()
        width = _weight(layer, parameters).shape[1]
        if not bool(((columns >= 0) & (columns < width)).all()):
            raise ValueError(f"{layer}.shira_indices: columns must lie in [0, {width})")
        found[f"{layer}.weight"] = rows * width + columns, values
    return found


def _super_tuning(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], config: Any
) -> _Entries:
    found = {}
    for layer, values in _of_layers(tensors, "supertuning_values"):
        positions = tensors.get(f"{layer}.supertuning_indices")
        if positions is None:  # they are the largest, or smallest, of the base weight
            magnitudes = _weight(layer, parameters).detach().abs().flatten()
            positions = torch.topk(magnitudes, len(values), largest=config.select_top).indices
        found[f"{layer}.weight"] = positions.cpu().long(), values
    return found


def _of_layers(tensors: Mapping[str, Tensor], local: str) -> Iterator[tuple[str, Tensor]]:
    """Name of a layer and its tensor of a name."""
    for key, values in tensors.items():
        layer, _, own = key.rpartition(".")
        if own == local:
            yield layer, values


def _weight(layer: str, parameters: Mapping[str, Tensor]) -> Tensor:
    name = f"{layer}.weight"
    if name not in parameters or parameters[name].dim() != 2:
        raise BaseModelMismatch(f"source: the model has no matrix {name}, which the adapter trains")
    return parameters[name]


def _task(
    model: nn.Module, now: BaseModel, entries: _Entries, tensors: Mapping[str, Tensor], kind: str
) -> TaskFile:
    """Entries as a task, with what else the tensors have, which PEFT has trained whole."""
    if not entries:
        raise ValueError("it trains no entries")
    positions, values = {}, {}
    for name, (flat, deltas) in entries.items():
        if flat.shape != deltas.shape:
            raise ValueError(f"{name} has {len(flat)} positions and {len(deltas)} values")
        order = torch.argsort(flat)
        positions[name], values[name] = flat[order], deltas[order].float()
    layers = {name.rpartition(".")[0] for name in entries}
    whole = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in layers}
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
