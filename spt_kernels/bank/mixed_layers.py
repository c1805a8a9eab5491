"""Single layers for a batch of several tasks: parameters that differ from sample to sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.autograd.autocast import without_autocast
from ..model.kept import forget_kept
from ..ops.add_sparse_rows import add_sparse_rows
from ..ops.write_delta import write_delta
from .banked_task import SparsePart
from .structured import each_times


class MixedCall(ABC):
    """One layer's part in a batch: makes of the base layer's output that of each sample's task.

    Args:
        module: the layer, with its base values.
        sparse: for each task, local parameter name -> entries.
        whole: for each task, local parameter name -> all values.
        counts: samples of each task, one after another.
    """

    def __init__(
        self,
        module: Any,
        sparse: Sequence[Mapping[str, SparsePart]],
        whole: Sequence[Mapping[str, Tensor]],
        counts: Sequence[int],
    ) -> None:
        self.module = module
        self.sparse = sparse
        self.whole = whole
        self.counts = counts

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The output for all samples; `y`, the base layer's for the input `x`, may be mutated."""

    def spans(self, n_rows: int) -> list[tuple[int, int]]:
        """Rows of each task among `n_rows` of the batch, which are as many for each sample."""
        per_sample = n_rows // sum(self.counts)
        found, last = [], 0
        for count in self.counts:
            found.append((last, last + count * per_sample))
            last += count * per_sample
        return found

    def vectors(self, local: str, but: Collection[int] = ()) -> Tensor | None:
        """A small parameter as each task has it, `[tasks, numel]`; None if all have the base's.

        Args:
            local: its name.
            but: tasks whose whole values do not count.
        """
        of_sparse = [(n, p[local]) for n, p in enumerate(self.sparse) if local in p]
        of_whole = [(n, v[local]) for n, v in enumerate(self.whole) if local in v and n not in but]
        base = self.module._parameters.get(local)
        if base is None or not (of_sparse or of_whole):
            return None
        found = base.detach().reshape(1, -1).repeat(len(self.counts), 1)
        if of_sparse:
            lengths = torch.tensor([len(part.tuned) for _, part in of_sparse], device="cpu")
            starts = torch.tensor([n * base.numel() for n, _ in of_sparse], device="cpu")
            offsets = starts.repeat_interleave(lengths).to(base.device)
            index = torch.cat([part.positions.index for _, part in of_sparse])
            found.view(-1)[index + offsets] = torch.cat([part.tuned for _, part in of_sparse])
        for n, values in of_whole:
            found[n] = values.reshape(-1)
        return found

    def per_sample(self, vectors: Tensor) -> Tensor:
        """`[tasks, numel]` as `[samples, 1, numel]`."""
        which = each_times(self.counts, vectors.device)
        return vectors.index_select(0, which)[:, None]


class MixedLinear(MixedCall):
    """A Linear: its product is taken once, with the base's weight, and what differs is added.

    Where tasks have the weight whole, as a head is, the product is taken with each of them; outputs
    that a task has fewer of than another are zeros. An Identity in a head's place is a Linear that
    the base does not have.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Product, entries, biases."""
        with without_autocast(y.device):
            own_weights = [values.get("weight") for values in self.whole]
            if any(weight is not None for weight in own_weights):
                y = self._with_own_weights(x, y, own_weights)
            if not isinstance(self.module, nn.Linear):
                return y
            y = y if y.is_contiguous() else y.contiguous()
            flat = y.view(-1, y.shape[-1])
            spans = self.spans(len(flat))
            some = [n for n, parts in enumerate(self.sparse) if "weight" in parts]
            if some:
                parts = [self.sparse[n]["weight"] for n in some]
                add_sparse_rows(
                    flat,
                    x.reshape(-1, x.shape[-1]).to(y.dtype).contiguous(),
                    [spans[n] for n in some],
                    [part.positions.index for part in parts],
                    [part.positions.base for part in parts],
                    [part.tuned for part in parts],
                )
            self._add_biases(flat)
        return y

    def _with_own_weights(self, x: Tensor, y: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        width = max(len(w) for w in weights if w is not None)
        width = max(width, y.shape[-1]) if None in weights else width
        found = x.new_zeros((*x.shape[:-1], width), dtype=y.dtype)
        bias = getattr(self.module, "bias", None)
        for n, (start, stop) in enumerate(self.spans(len(x))):
            weight = weights[n]
            if weight is None:
                found[start:stop, ..., : y.shape[-1]] = y[start:stop]
                continue
            own = self.whole[n].get("bias")
            if own is None and bias is not None and len(bias) == len(weight):
                own = bias
            own = None if own is None else own.to(y.dtype)
            product = F.linear(x[start:stop].to(y.dtype), weight.to(y.dtype), own)
            found[start:stop, ..., : len(weight)] = product
        return found

    def _add_biases(self, flat: Tensor) -> None:
        """Add what the biases differ by, but for those that came with a whole weight."""
        with_weight = [n for n, values in enumerate(self.whole) if "weight" in values]
        biases = self.vectors("bias", but=with_weight)
        if biases is not None:
            base = self.module.bias.detach().to(flat.dtype).float()
            change = biases.to(flat.dtype).float() - base
            per_sample = flat.view(sum(self.counts), -1, flat.shape[-1])
            per_sample.add_(self.per_sample(change).to(flat.dtype))


class MixedNorm(MixedCall):
    """A LayerNorm: normalised once, in fp32, then scaled and shifted for each sample."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Made of the input alone."""
        with without_autocast(y.device):
            own: nn.LayerNorm = self.module
            found = F.layer_norm(x.float(), own.normalized_shape, eps=own.eps)
            found = found.view(sum(self.counts), -1, own.weight.numel())
            for local, apply in (("weight", Tensor.mul_), ("bias", Tensor.add_)):
                vectors = self.vectors(local)
                base = own._parameters.get(local)
                if vectors is not None:
                    apply(found, self.per_sample(vectors).float())
                elif base is not None:
                    apply(found, base.detach().reshape(-1).float())
        return found.view(y.shape).to(y.dtype)


class MixedPieces(MixedCall):
    """Any other layer: called for each task's samples, with that task's parameters."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The base layer's output where a task has nothing else."""
        found = y.clone()
        for n, (rows, result) in enumerate(
            zip(self.spans(len(x)), self.spans(len(y)), strict=True)
        ):
            if self.sparse[n] or self.whole[n]:
                with _Lent(self.module, self.sparse[n], self.whole[n]):
                    found[slice(*result)] = type(self.module).forward(self.module, x[slice(*rows)])
        return found


class _Lent:
    """The parameters of a layer with a task's values, for the time of a `with` block."""

    def __init__(
        self, module: Any, sparse: Mapping[str, SparsePart], whole: Mapping[str, Tensor]
    ) -> None:
        self._module, self._parameters = module, module._parameters
        self._sparse, self._whole = sparse, whole

    def __enter__(self) -> None:
        self._base = {local: self._parameters[local].detach().clone() for local in self._whole}
        for local, values in self._whole.items():
            self._parameters[local].detach().copy_(values)
        self._write([part.tuned for part in self._sparse.values()])

    def __exit__(self, *_error: object) -> None:
        for local, values in self._base.items():
            self._parameters[local].detach().copy_(values)
        self._write([part.positions.base for part in self._sparse.values()])

    def _write(self, values: list[Tensor]) -> None:
        targets = [self._parameters[local] for local in self._sparse]
        indices = [part.positions.index for part in self._sparse.values()]
        write_delta(targets, indices, values, None)
        forget_kept([self._module])
