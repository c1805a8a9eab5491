"""A model that one method has made ready to train, and what becomes of it afterwards."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import BaseModelMismatch, DeltaFormatError
from ..files import checked_file
from ..files.atomic import write_atomically
from ..model import (
    HeadPatterns,
    backbone_numel,
    describe,
    head_names,
    head_numel,
    possible_names,
)
from ..model.tied import check_own_memory, sharing_names
from ..offloading import OffloadedAdamW, brought_back
from ..optim import SparseAdamW, param_groups
from ..plan import AdapterSpec, LoraSpec, Plan
from ..task import load_delta, merge, save_delta
from ..task.file.fingerprint import Fingerprint
from ..tuning import apply
from .method import DEFAULT_RANK

IN_MODEL = "spt_kernels"  # of a safetensors header: where a whole model has its metadata, as JSON


@dataclass(frozen=True)
class Tunable:
    """A model ready to train.

    Attributes:
        model: trains what requires a gradient.
        trained: how many values change, besides the head's.
        plan: what was applied, None where nothing was.
        fold: makes the plain model of the trained one, in place; None where nothing can.
        file: what `save` writes: the `"task"`, what was `"trained"`, or the whole `"model"`.
        in_head: how many values of the head change.
        tuned_as: what decides its modules, as JSON values by name; a file of what was `"trained"`
            tells it, and one that tells another is refused.
    """

    model: nn.Module
    trained: int
    plan: Plan | None = None
    fold: Callable[[nn.Module], nn.Module] | None = None
    file: str = "trained"
    in_head: int = 0
    tuned_as: Mapping[str, Any] = field(default_factory=dict)

    def optimizer(
        self,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        *,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> torch.optim.Optimizer:
        """The optimizer of all that is trained; see `make_optimizer`."""
        return make_optimizer(self.model, lr, weight_decay, fused=fused, capturable=capturable)

    def deployed(self) -> nn.Module:
        """What a user would run: the plain model where the method can be folded in."""
        if self.fold is None:
            return self.model
        with brought_back(self.model):
            plain = self.fold(self.model)
        vars(plain).pop("spt_method", None)  # it may be tuned anew
        return plain

    def save(
        self, path: str | os.PathLike[str], metadata: Mapping[str, Any] = MappingProxyType({})
    ) -> int:
        """Write what was learnt, whole or not at all, and return the size of the file in bytes.

        Args:
            path: of the file.
            metadata: what else it is to tell, as JSON values by name.
        """
        if self.file == "task":
            return save_delta(self.model, path, metadata=metadata)
        if self.file == "trained":
            base = {name: own.to_json() for name, own in self._base().items()}
            document = {"model_name": type(self.model).__name__, "base": base}
            if self.tuned_as:
                document["tuned_as"] = dict(self.tuned_as)
            if metadata:
                document["metadata"] = dict(metadata)
            return checked_file.write(path, "trained", document, self._state())
        # what is tied is there under each of its names, as whoever loads it expects
        state = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.model.state_dict().items()
        }
        # under one key: the order of several would be another at each time
        file = save(state, {IN_MODEL: json.dumps(dict(metadata))} if metadata else None)
        write_atomically(path, file)
        return len(file)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save` wrote of a model tuned likewise; a task may be of another plan.

        Raises:
            DeltaFormatError: the file is damaged, or another kind of file.
            BaseModelMismatch: it was trained on another base model.
            ValueError: it is of a model that is tuned otherwise.
        """
        if self.file == "task":
            load_delta(self.model, path)
            return
        if self.file == "model":
            try:
                tensors, own = load_file(path), self.model.state_dict()
            except SafetensorError as error:
                raise DeltaFormatError(
                    f"cannot load the model {os.fspath(path)}: {error}"
                ) from error
        else:
            base, tuned_as, tensors = checked_file.read(path, "trained", _parse)
            own = self._state()
            # before 0.8.0 what is tied was there under other names, too
            others = self._other_names()
            tensors = {name: t for name, t in tensors.items() if name not in others}
            for name in self.tuned_as.keys() & tuned_as.keys():
                told, mine = json.dumps(tuned_as[name]), json.dumps(self.tuned_as[name])
                if told != mine:
                    raise ValueError(
                        f"{os.fspath(path)}: is of a model that is tuned otherwise: its {name} is "
                        f"{told}, here it is {mine}"
                    )
        shapes = {(name, tensor.shape) for name, tensor in tensors.items()}
        if differing := shapes ^ {(name, tensor.shape) for name, tensor in own.items()}:
            first = min(name for name, _ in differing)
            raise ValueError(
                f"{os.fspath(path)}: is of a model that is tuned otherwise: {first} differs"
            )
        if self.file == "trained":
            self._check_base(os.fspath(path), base)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def file_bytes(self) -> int:
        """The size of what `save` writes."""
        with tempfile.TemporaryDirectory() as folder:
            return self.save(Path(folder) / "saved.safetensors")

    def _base(self) -> dict[str, Fingerprint]:
        """Fingerprints of what training does not change."""
        parameters = self.model.named_parameters()
        frozen = {n: (p.detach(), None, None) for n, p in parameters if not p.requires_grad}
        return Fingerprint.of_all(frozen)

    def _check_base(self, path: str, expected: Mapping[str, Fingerprint]) -> None:
        found = self._base()
        for name in sorted(expected.keys() ^ found.keys()):
            whose = "the model" if name in expected else "its base"
            raise BaseModelMismatch(f"{path}: made for another base model: {whose} has no {name}")
        for name, fingerprint in expected.items():
            problem = fingerprint.difference(found[name])
            if problem is not None:
                raise BaseModelMismatch(f"{path}: made for another base model: {name}: {problem}")

    def _state(self) -> dict[str, Tensor]:
        """What training changes: the trained parameters, and running statistics."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        left_out = frozen | self._other_names()
        return {name: t for name, t in self.model.state_dict().items() if name not in left_out}

    def _other_names(self) -> set[str]:
        """All names but the first of parameters that are tied."""
        every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return every - {name for name, _ in self.model.named_parameters()}


def _parse(
    document: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Fingerprint], Mapping[str, Any], dict[str, Tensor]]:
    base = {n: Fingerprint.from_json(value) for n, value in document["base"].items()}
    return base, dict(document.get("tuned_as", {})), tensors


def make_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    fused: bool | None = None,
    capturable: bool = False,
    state_on_host: bool = False,
) -> torch.optim.Optimizer:
    """SparseAdamW for a model that a plan was applied to, else AdamW; neither decays vectors.

    Args:
        model: ready to train.
        lr: learning rate.
        weight_decay: of matrices.
        fused: of AdamW, as torch has it.
        capturable: so that a CUDA graph can hold its step; AdamW is then fused.
        state_on_host: `OffloadedAdamW` in place of either, which no CUDA graph can hold.
    """
    groups = param_groups(model, weight_decay=weight_decay)
    if state_on_host:
        return OffloadedAdamW(groups, lr=lr, fused=fused)
    if hasattr(model, "spt_tuning"):
        return SparseAdamW(groups, lr=lr, capturable=capturable)
    return torch.optim.AdamW(groups, lr=lr, fused=capturable or fused, capturable=capturable)


def applied(model: nn.Module, plan: Plan | None) -> Tunable:
    """`model` tuned by a plan; an Adapter has a nonlinearity, which nothing can fold in."""
    assert plan is not None
    apply(model, plan)
    fold = None if plan.kind == "adapter" and plan.structured else merge
    tuning: Any = model.spt_tuning
    in_head = sum(base.numel() for base in tuning.base_head.values())
    return Tunable(model, plan.num_trainable, plan, fold, "task", in_head)


def counted(
    model: nn.Module,
    fold: Callable[[nn.Module], nn.Module] | None = None,
    file: str = "trained",
    *,
    head: HeadPatterns | None = None,
    in_head: int | None = None,
) -> Tunable:
    """A model that trains, whole, every parameter that requires a gradient.

    Args:
        model: ready to train.
        fold: as `Tunable` has it.
        file: likewise.
        head: of the model, as `head_names` has it.
        in_head: how much of what is trained is the head, where `head` cannot tell.

    Raises:
        ValueError: what is trained lies in the memory of another parameter.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name, parameter in every.items() if parameter.requires_grad]
    check_own_memory(names, every, sharing_names(every.items()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_head = head_numel(model, head) if in_head is None else in_head
    return Tunable(model, trained - in_head, fold=fold, file=file, in_head=in_head)


def as_it_is(model: nn.Module) -> nn.Module:
    """The way to fold in what changed the plain model itself."""
    return model


def plan_of(
    model: nn.Module,
    unstructured: Mapping[str, Tensor] = MappingProxyType({}),
    structured: Mapping[str, LoraSpec | AdapterSpec] = MappingProxyType({}),
    *,
    head: HeadPatterns | None = None,
) -> Plan:
    """A plan for `model` that no scores were asked for."""
    info = describe(model)
    spec = next(iter(structured.values()), None)
    return Plan(
        unstructured=unstructured,
        structured=structured,
        info={name: info[name] for name in possible_names(model, head=head)},
        head=head_names(model, head),
        model_name=type(model).__name__,
        kind=None if spec is None else spec.kind,
        rank=DEFAULT_RANK if spec is None else spec.rank,
        backbone_numel=backbone_numel(model, head),
        head_source="names" if head is None else "given",
    )


def freeze_backbone(model: nn.Module, head: HeadPatterns | None = None) -> None:
    """Train the head alone, which is as `head_names` has it."""
    model.requires_grad_(False)
    for name in head_names(model, head):
        model.get_parameter(name).requires_grad_()
