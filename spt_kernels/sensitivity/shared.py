"""A measurement that several processes share: each takes some of the samples, all get the sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..distributed import Processes
from ..model import ParameterInfo
from ..model.digest import digests_of_model
from .per_sample.batches import NoSamples
from .per_sample.measurement import check_finite
from .scores import Sensitivity, check_num_samples

# In which the measurements of two processes of one model are the same
_SAME = ("model_name", "head", "head_source", "backbone_numel")


def measured_together(
    processes: Processes,
    model: nn.Module,
    num_samples: int,
    measure: Callable[[int], Sensitivity],
) -> Sensitivity:
    """The sums of what each process measures.

    Args:
        processes: that share the samples.
        model: the same in all of them.
        num_samples: in all.
        measure: measures so many samples in this process.

    Raises:
        NoSamples: no process has any.
        OtherProcessFailed: another process cannot measure.
        ValueError: the models differ, or what was found of them does, or `num_samples`.
    """
    check_num_samples(num_samples)
    if processes.size == 1:
        return measure(num_samples)

    def own_part() -> tuple[Sensitivity | None, dict[str, str]]:
        own = processes.share(num_samples)
        try:
            part = measure(own) if own else None
        except NoSamples:
            part = None
        return part, digests_of_model(model)

    part, digests = processes.together(own_part)
    outline_here = None if part is None else _but_scores(part)
    outlines, models, wanted = zip(
        *processes.gather((outline_here, digests, num_samples)), strict=True
    )
    if len(set(wanted)) > 1:
        raise ValueError(f"num_samples: expected the same in all processes, got {list(wanted)}")
    _check_same_models(models)
    outline = _combined(outlines)
    if part is not None:
        scores = dict(part.scores)
    else:
        parameters = dict(model.named_parameters())
        scores = {
            name: torch.zeros(what.shape, dtype=torch.float32, device=parameters[name].device)
            for name, what in outline["info"].items()
        }
    processes.sum_(list(scores.values()))
    check_finite(scores)
    return Sensitivity(scores=scores, **outline)


def _but_scores(part: Sensitivity) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in fields(part) if f.name != "scores"}


def _check_same_models(digests: Sequence[Mapping[str, str]]) -> None:
    for rank, own in enumerate(digests):
        for name in {**digests[0], **own}:
            if digests[0].get(name) != own.get(name):
                raise ValueError(
                    f"model: {name} is another one in process {rank} than in process 0: expected "
                    "the same model in all of them, loaded from one file or made with one seed"
                )


def _combined(outlines: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """What is known of the parameters besides scores, where every process has seen its samples."""
    parts = {rank: outline for rank, outline in enumerate(outlines) if outline is not None}
    if not parts:
        raise NoSamples("batches: expected at least one batch of samples, got none in any process")
    first, *others = parts
    combined = dict(parts[first])
    for rank in others:
        for name in _SAME:
            if parts[rank][name] != combined[name]:
                raise ValueError(
                    f"{name}: process {rank} has found {parts[rank][name]}, and process {first} "
                    f"{combined[name]}: expected the same arguments in all of them"
                )
        if list(parts[rank]["info"]) != list(combined["info"]):
            raise ValueError(
                f"include, exclude: process {rank} has measured other parameters than process "
                f"{first}: expected the same arguments in all of them"
            )
    every = list(parts.values())
    names = list(combined["info"])
    combined["info"] = {name: _combined_info(name, every) for name in names}
    for field, among in (("fallback", any), ("idle", all)):
        combined[field] = tuple(
            name for name in names if among(name in part[field] for part in every)
        )
    combined["num_samples"] = sum(part["num_samples"] for part in every)
    return combined


def _combined_info(name: str, parts: Sequence[Mapping[str, Any]]) -> ParameterInfo:
    """What a parameter is to all processes, some of which may have no sample that uses it.

    To these it looks as if nobody called its layer; to whom it is read, it is.
    """
    used: list[ParameterInfo] = [part["info"][name] for part in parts if name not in part["idle"]]
    found = used or [parts[0]["info"][name]]
    return next((info for info in found if info.is_read), found[0])
