"""One task as a bank holds it: what a model takes from it, in the dtype and where the model is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from ..layers.autograd.row_ranges import Ranges
from ..plan import AdapterSpec, LoraSpec


@dataclass(frozen=True, eq=False)
class Positions:
    """Trained positions of a parameter, held once for all tasks that have the same.

    Attributes:
        index: int32 `[nnz]`, sorted flat positions.
        base: `[nnz]` in the parameter's dtype: its values there in the base model.
    """

    index: Tensor
    base: Tensor


@dataclass(frozen=True, eq=False)
class SparsePart:
    """What a task makes of a few entries of one parameter.

    Attributes:
        positions: which.
        tuned: `[nnz]` in the parameter's dtype: base + delta, rounded as a tuned weight holds it.
    """

    positions: Positions
    tuned: Tensor


@dataclass(frozen=True, eq=False)
class StructuredPart:
    """The LoRA or Adapter of a task on one matrix.

    Attributes:
        spec: what it is.
        ranges: the output features that it is on.
        tensors: by their names in the layer, fp32; see `structured_shapes`.
    """

    spec: LoraSpec | AdapterSpec
    ranges: Ranges
    tensors: Mapping[str, Tensor]


class OwnParameters(NamedTuple):
    """What a task has for the parameters of one module, by their names in it."""

    sparse: dict[str, SparsePart]
    whole: dict[str, Tensor]
    structured: dict[str, StructuredPart]


@dataclass(frozen=True, eq=False)
class BankedTask:
    """A task in memory, ready to be put on its base.

    Attributes:
        sparse: parameter name -> entries.
        structured: name of a weight -> LoRA or Adapter.
        whole: parameter name -> all of its values, in the base's dtype.
        head: names of the parameters of the head, which are among those.
        elsewhere: names of parameters that a module of the head may have besides.
        replaced: names of modules of the head that are of another size than the base's.
        buffers: buffer name -> value.
        classes: names of the classes, if they are known.
        read: names of modules whose parameters the model reads without calling the module.
    """

    sparse: Mapping[str, SparsePart]
    structured: Mapping[str, StructuredPart]
    whole: Mapping[str, Tensor]
    head: tuple[str, ...]
    elsewhere: frozenset[str]
    replaced: frozenset[str]
    buffers: Mapping[str, Tensor]
    classes: tuple[str, ...]
    read: frozenset[str]

    @cached_property
    def by_module(self) -> Mapping[str, OwnParameters]:
        """Module name -> what the task has for the module's own parameters, by local names."""
        found: dict[str, OwnParameters] = {}
        kept: tuple[Mapping[str, Any], ...] = self.sparse, self.whole, self.structured
        for part, values in enumerate(kept):
            for name, value in values.items():
                module, _, local = name.rpartition(".")
                own: Any = found.setdefault(module, OwnParameters({}, {}, {}))
                own[part][local] = value
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it keeps in memory."""
        for part in self.sparse.values():
            yield from (part.positions.index, part.positions.base, part.tuned)
        for structured in self.structured.values():
            yield from structured.tensors.values()
        yield from self.whole.values()
        yield from self.buffers.values()

    @property
    def nbytes(self) -> int:
        """Of everything that it keeps in memory, positions shared with others among it."""
        return sum(tensor.nbytes for tensor in self.tensors())
