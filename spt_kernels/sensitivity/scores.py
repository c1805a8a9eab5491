"""The `Sensitivity`: one score per candidate parameter, and the file of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..files import checked_file
from ..files.json_kinds import COUNT, TEXT, TEXTS, Kind, Kinds, check
from ..model import HeadPatterns, HeadSource, ParameterInfo, guess
from ..model.head import as_patterns, head_source, matching_names

_PAIRS = Kind(
    "a list of pairs, each of a name and what is there",
    lambda value: (
        isinstance(value, list)
        and all(isinstance(pair, list) and len(pair) == 2 and TEXT.holds(pair[0]) for pair in value)
    ),
)
_JSON: Kinds = {  # of a file
    "info": _PAIRS,
    "num_samples": COUNT,
    "model_name": TEXT,
    "head": TEXTS,
    "backbone_numel": COUNT,
    "fallback": TEXTS,
    "idle": TEXTS,
}


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Mapping[str, Tensor]):
    """The sensitivity of every candidate parameter: `sensitivity[name]` is Σ g² over samples.

    Attributes:
        scores: by parameter name, in the model's order; fp32, shaped like the parameter.
        info: what each of these parameters is.
        num_samples: how many samples were summed.
        model_name: of the model that was measured.
        head: names of the head's parameters, which are trained whole, whatever the budget.
        backbone_numel: how many parameters the model has besides its head.
        fallback: names that were measured sample by sample with plain autograd.
        head_source: where the head is known from: `"loss"`, as what comes last before it;
            `"given"`, by the user; `"names"`; or `""` where nobody has decided, and an empty `head`
            means that `apply` goes by names.
        idle: names that no sample's loss depended on, and which therefore score 0.
    """

    scores: Mapping[str, Tensor]
    info: Mapping[str, ParameterInfo]
    num_samples: int
    model_name: str = ""
    head: tuple[str, ...] = ()
    backbone_numel: int = 0
    fallback: tuple[str, ...] = ()
    head_source: HeadSource = ""
    idle: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if list(self.scores) != list(self.info):
            raise ValueError("scores and info must name the same parameters in the same order")
        for name, score in self.scores.items():
            if tuple(score.shape) != self.info[name].shape:
                raise ValueError(
                    f"scores[{name!r}]: expected shape {self.info[name].shape}, got "
                    f"{tuple(score.shape)}"
                )
        for field in ("scores", "info"):  # later changes of the caller's dicts must not show here
            object.__setattr__(self, field, dict(getattr(self, field)))

    def __getitem__(self, name: str) -> Tensor:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __eq__(self, other: object) -> bool:
        """Whether two hold the same scores of the same measurement, on whichever device."""
        if not isinstance(other, Sensitivity):
            return NotImplemented
        return (
            all(
                getattr(self, f.name) == getattr(other, f.name)
                for f in fields(self)
                if f.name != "scores"
            )
            and self.scores.keys() == other.scores.keys()
            and all(
                torch.equal(score.cpu(), other.scores[name].cpu())
                for name, score in self.scores.items()
            )
        )

    def __hash__(self) -> int:
        # scores are left out: equal ones have equal hashes all the same
        return hash((self.model_name, self.num_samples, self.backbone_numel, tuple(self.info)))

    def __repr__(self) -> str:
        numel = sum(what.numel for what in self.info.values())
        parts = [f"{len(self)} parameters of {numel:,} numbers", f"{self.num_samples} samples"]
        if self.model_name:
            parts.insert(0, self.model_name)
        if self.fallback:
            parts.append(f"{len(self.fallback)} by fallback")
        if self.idle:
            parts.append(f"{len(self.idle)} idle")
        return f"Sensitivity({', '.join(parts)})"

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        num_samples: int,
        *,
        info: Mapping[str, ParameterInfo] | None = None,
        model_name: str = "",
        head: HeadPatterns | None = None,
        backbone_numel: int | None = None,
    ) -> Sensitivity:
        """Make a sensitivity of one's own scores.

        Args:
            tensors: non-negative scores by parameter name, each shaped like its parameter; any
                floating dtype, kept as fp32.
            num_samples: how many samples they were summed over.
            info: what each parameter is, from `spt_kernels.model.describe(model)`; guessed from
                names and shapes when left out.
            model_name: for the record.
            head: what will be trained whole, outside the budget: names of parameters, or of modules
                or patterns that `apply` is to find in the model; `()` or `"none"` for no head.
                There being no model to look at, `apply` goes by names when it is left out: what a
                timm model calls its classifier, or what is called `head`, `fc`, `classifier` and
                the like (`head_names`). Scores of the head are left out.
            backbone_numel: of what a budget below 1 is a share; by default of all scores.

        Raises:
            TypeError: something is not a floating tensor.
            ValueError: no tensors, `num_samples` below 1, or a shape that contradicts `info`.
        """
        if not tensors:
            raise ValueError("tensors: expected at least one score, got none")
        check_num_samples(num_samples)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"tensors[{name!r}]: expected a floating tensor, got {got}")
            if info is not None and name not in info:
                raise ValueError(f"info: expected an entry for {name!r}, got none")
        described = {
            name: info[name] if info is not None else guess(name, tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        patterns = () if head is None else as_patterns(head)
        of_head = {n for p in patterns for n in matching_names(tensors, p)}
        if of_head and len(of_head) == len(tensors):
            raise ValueError(f"head: {head!r} is all that there are scores of")
        scores = {n: tensor.detach().float() for n, tensor in tensors.items() if n not in of_head}
        if backbone_numel is None:
            backbone_numel = sum(score.numel() for score in scores.values())
        return cls(
            scores=scores,
            info={name: described[name] for name in scores},
            num_samples=num_samples,
            model_name=model_name,
            head=patterns,
            backbone_numel=backbone_numel,
            head_source="" if head is None else "given",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all."""
        document = {
            "info": [[name, what.to_json()] for name, what in self.info.items()],
            "num_samples": self.num_samples,
            "model_name": self.model_name,
            "head": list(self.head),
            "backbone_numel": self.backbone_numel,
            "fallback": list(self.fallback),
            "head_source": self.head_source,
            "idle": list(self.idle),
        }
        checked_file.write(path, "sensitivity", document, self.scores)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what `save` wrote, onto the CPU; `DeltaFormatError` when the file is not whole."""
        return checked_file.read(path, "sensitivity", cls._from_json)

    @classmethod
    def _from_json(cls, document: Mapping[str, Any], scores: Mapping[str, Tensor]) -> Sensitivity:
        check(document, _JSON)
        info = {name: ParameterInfo.from_json(what) for name, what in document["info"]}
        for name in scores.keys() - info.keys():
            raise ValueError(f"info: expected what {name!r} is, which there are scores of")
        return cls(
            scores={name: scores[name] for name in info},
            info=info,
            num_samples=document["num_samples"],
            model_name=document["model_name"],
            head=tuple(document["head"]),
            backbone_numel=document["backbone_numel"],
            fallback=tuple(document["fallback"]),
            # what older files do not have
            head_source=head_source(document.get("head_source", "")),
            idle=tuple(document.get("idle", ())),
        )


def check_num_samples(num_samples: Any) -> None:
    """Raise unless `num_samples` is an int of at least 1."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples: expected an int, got {type(num_samples).__name__}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
