"""Which blocks of a model can have matrices on the host, and which of them shall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from ..model import innermost_blocks
from .matrix import Matrix
from .pinned_tensors import is_dense


@dataclass(frozen=True)
class Choice:
    """Block -> its frozen matrices, in the order of the model.

    Attributes:
        streamed: those that go to the host.
        kept: those that could, and stay.
        forward_only: the blocks that come before anything that is trained.
    """

    streamed: dict[str, list[Matrix]]
    kept: dict[str, list[Matrix]]
    forward_only: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, what: str, keep_bytes: int, on_host: Collection[int]) -> Choice:
        """Choose.

        Args:
            model: any module.
            what: of `WHAT`, but `"nothing"`.
            keep_bytes: that may stay on the device, by whole blocks, the last ones first.
            on_host: ids of parameters that are streamed already, and share their memory therefore.
        """
        matrices, forward_only = _matrices_by_block(model, on_host)
        wanted = {
            name: found
            for name, found in matrices.items()
            if what == "frozen" or name in forward_only
        }
        kept: dict[str, list[Matrix]] = {}
        left = keep_bytes
        for name in reversed(list(wanted)):
            left -= nbytes_of(wanted[name])
            if left < 0:
                break
            kept[name] = wanted[name]
        kept = {name: kept[name] for name in wanted if name in kept}
        streamed = {name: found for name, found in wanted.items() if name not in kept}
        return cls(streamed, kept, forward_only)


def nbytes_of(matrices: list[Matrix]) -> int:
    """Their bytes in their own dtypes."""
    return sum(matrix.parameter.nbytes for matrix in matrices)


def _matrices_by_block(
    model: nn.Module, on_host: Collection[int]
) -> tuple[dict[str, list[Matrix]], tuple[str, ...]]:
    blocks = innermost_blocks(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    named = list(model.named_parameters(remove_duplicate=False))
    names = Counter(id(parameter) for _, parameter in named)
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    sharing = Counter(_memory_of(t) for key, t in tensors.items() if key not in on_host)
    found: dict[str, list[Matrix]] = {name: [] for name in blocks}
    trained = [n for n, (_, parameter) in enumerate(named) if parameter.requires_grad]
    first_trained = min(trained, default=len(named))
    reached = set()
    for n, (name, parameter) in enumerate(named):
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            continue
        if n >= first_trained:
            reached.add(block)
        owner, _, local = name.rpartition(".")
        matrix = Matrix(name, modules[owner], local, parameter)
        is_own = names[id(parameter)] == 1 and sharing[_memory_of(parameter)] <= 1
        is_frozen = not parameter.requires_grad and parameter.dim() >= 2
        delta = matrix.delta
        if is_own and is_frozen and is_dense(parameter) and not (delta and delta.whole):
            found[block].append(matrix)
    forward_only = tuple(block for block in blocks if block not in reached)
    return {name: matrices for name, matrices in found.items() if matrices}, forward_only


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
