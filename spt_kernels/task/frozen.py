"""The frozen parameters of a tuned model beside what they were: found, written back, or lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..layers import write_deltas
from ..model.quantized import is_quantized
from ..tuning import FrozenBase
from .base_model import BaseModel, BaseTensor
from .file.fingerprint import Fingerprint, dtype_name
from .intact import dense_names, tuning_of


@dataclass(frozen=True, eq=False)
class FrozenState:
    """What has become of the parameters that `apply` froze.

    Attributes:
        base: name -> fingerprint of what it was.
        present: name -> fingerprint of what it is, once `write_back` has been at it: that of
            `base`, but for what is lost, and where the model was given another dtype.
        rounded: name -> a tensor with the base values, for what no longer has them; at the
            positions of its delta it may hold anything.
        lost: names of what has other values than it had, which nothing holds any more.
    """

    base: Mapping[str, Fingerprint]
    present: Mapping[str, Fingerprint]
    rounded: Mapping[str, Tensor]
    lost: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, now: BaseModel) -> FrozenState:
        """Look at a tuned model; `task_problem` found nothing wrong with it."""
        frozen = tuning_of(model).frozen or FrozenBase({})
        rows = now.base_tensors(frozen.tensors.keys() - dense_names(model, now))
        base = {name: _fingerprint(frozen, name) for name in frozen.tensors}
        if now.is_sharded:  # no process has a whole parameter to look at
            return cls(base, base, {}, ())
        found = Fingerprint.of_all(rows)
        changed = {n for n in rows if found[n].dtype == base[n].dtype and found[n] != base[n]}

        # what an average in a wider dtype holds besides is rounding: the base is what is nearest
        wider = {n: r for n, r in rows.items() if _is_wider(r[0].dtype, frozen.tensors[n].dtype)}
        narrow = {n: _in_dtype(row, frozen.tensors[n].dtype) for n, row in wider.items()}
        narrow = {n: narrow[n] for n, f in Fingerprint.of_all(narrow).items() if f == base[n]}
        changed |= wider.keys() - narrow.keys()
        sources = _sources(frozen, {n: rows[n] for n in changed}, base)

        known = {**narrow, **sources}
        again = Fingerprint.of_all(
            {n: (t.to(rows[n][0]), *rows[n][1:]) for n, (t, *_) in known.items()}
        )
        rounded = {n: known[n][0] for n in known if again[n] != found[n]}
        lost = tuple(n for n in rows if n in changed - known.keys())
        return cls(base, found | again, rounded, lost)

    @property
    def problem(self) -> str | None:
        """What to do about what is lost; None where nothing is."""
        if not self.lost:
            return None
        others = f" and {len(self.lost) - 1} others" if len(self.lost) > 1 else ""
        return (
            f"{self.lost[0]}{others} is frozen, and yet no longer what it was when the plan was "
            "applied, so that the task would fit no base model. If the whole model was averaged, "
            "which rounds what is frozen: keep the model that was copied for it until the task is "
            "saved, or take a fresh base, spt.apply(base, model.spt_tuning.plan), and load the "
            "rest into it: base.load_state_dict({**{n: p for n, p in model.named_parameters() if "
            "p.requires_grad}, **dict(model.named_buffers())}, strict=False). If it was trained on "
            "purpose: requires_grad_(True) on it, and the task has it whole"
        )

    @torch.no_grad()
    def write_back(self, now: BaseModel) -> None:
        """Give what is rounded its base values again; its deltas stay on top of them."""
        for name, values in self.rounded.items():
            now.parameters[name].copy_(values)
        write_deltas([now.deltas[name] for name in self.rounded.keys() & now.deltas.keys()])


def _fingerprint(frozen: FrozenBase, name: str) -> Fingerprint:
    dtype, shape, digest, quantization = frozen.tensors[name]
    return Fingerprint(dtype_name(dtype, quantization), shape, digest)


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Whether every value of one dtype is one of another, too."""
    return dtype != than and torch.promote_types(dtype, than) == dtype


def _in_dtype(row: BaseTensor, dtype: torch.dtype) -> BaseTensor:
    tensor, index, original = row
    return tensor.to(dtype), index, None if original is None else original.to(dtype)


def _sources(
    frozen: FrozenBase, rows: Mapping[str, BaseTensor], base: Mapping[str, Fingerprint]
) -> dict[str, BaseTensor]:
    """What was copied to make this model, where that lives and has the base values yet."""
    found: dict[str, BaseTensor] = {}
    for i in range(max((len(refs) for refs in frozen.sources.values()), default=0)):
        some: dict[str, BaseTensor] = {}
        for name, (own, index, original) in rows.items():
            references = frozen.sources.get(name, ())
            source = references[i]() if name not in found and i < len(references) else None
            if source is None or not _may_be(source, own, base[name]):
                continue
            there = source.detach(), index, original
            moved: Any = tuple(None if t is None else t.to(source.device) for t in there)
            some[name] = _in_dtype(moved, source.dtype)
        found |= {n: some[n] for n, print_ in Fingerprint.of_all(some).items() if print_ == base[n]}
    return found


def _may_be(source: Tensor, own: Tensor, base: Fingerprint) -> bool:
    # copies of what is quantized are told by its inner tensors, and are never edited
    if is_quantized(source) or is_sharded(source):
        return False
    dtype = str(source.dtype).removeprefix("torch.")
    is_like = dtype == base.dtype and tuple(source.shape) == base.shape
    return is_like and not source.is_meta and source.data_ptr() != own.data_ptr()
