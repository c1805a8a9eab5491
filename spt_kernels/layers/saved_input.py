"""`SavedInput`: what a layer keeps of its input for the backward, and how the input is had again.

The activation itself is kept only when nothing better is at hand. After a GELU or a LayerNorm the
autograd graph holds the producer's own input anyway: its node is remembered, not what it saves, and
in the backward, which comes to the producer last, one elementwise pass over that gives the input
back. Autograd checks the versions of what is read there, and that no backward has freed it.

An activation that is edited between its producer and the layer is kept as it is: its version tells.
Only other memory given to `activation.data`, or a write into that, leaves no trace; what is rebuilt
is then the activation before it. Edit under `torch.no_grad()` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.launching import may_launch
from ..ops.rebuild_input import launch_gelu, launch_layer_norm, rebuild_gelu, rebuild_layer_norm
from .recording import Recording, hooks_in_use, recording_of, unpack
from .traced import made_again

_RESHAPES = frozenset({"ViewBackward0", "ReshapeAliasBackward0"})
_MOVES = frozenset({"PermuteBackward0", "TransposeBackward0"}) | _RESHAPES
# Nodes that may lie between a tensor and the node whose output it shares its storage with
_VIEWS = frozenset(
    {"AliasBackward0", "AsStridedBackward0", "ExpandBackward0", "SelectBackward0"}
    | {"SliceBackward0", "SplitBackward0", "SqueezeBackward0", "SqueezeBackward1"}
    | {"TBackward0", "UnbindBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0"}
    | _MOVES
)
_PRODUCERS: dict[str, Kind] = {
    "GeluBackward0": "gelu",
    "NativeLayerNormBackward0": "layer_norm",
}
_REBUILDABLE = (torch.float32, torch.bfloat16, torch.float16)
# Tensors that are what autograd takes them for; other subclasses may be anything
_INSPECTED: tuple[type[Tensor], ...] = (Tensor, torch.nn.Parameter, FakeTensor)

Tensors = tuple[Tensor | None, ...]
Kind = Literal["tensor", "columns", "gelu", "layer_norm", "function"]
Step = tuple[Literal["reshape", "permute"], tuple[int, ...]]


class SavedInput(NamedTuple):
    """A recipe for a layer's input, from a saved tensor or from what its producer keeps.

    Attributes:
        kind: `tensor` (the input itself), `columns` (some of one dimension of it), `gelu` or
            `layer_norm` (what their producer keeps), `function` (what one of ours keeps that can
            tell its output again).
        dtype: of the input as the layer computes with it.
        producer: the autograd node of a GELU, a LayerNorm or a function; the layer's own node leads
            to it anyway, so that it lives no longer for this.
        steps: reshapes and permutations between the producer's output and the layer.
    """

    kind: Kind
    dtype: torch.dtype
    producer: Any = None
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(
        cls, x: Tensor, dtype: torch.dtype, columns: Tensor | None = None, dim: int = -1
    ) -> tuple[SavedInput, Tensors]:
        """Choose what to keep of `x`: the recipe, and the tensors for `save_for_backward`.

        Args:
            x: the input as the layer was given it.
            dtype: in which the layer computes (another than that of `x` under autocast).
            columns: int32 `[n_cols]`, all that the backward needs of dimension `dim`; None when it
                needs all of it.
            dim: in which the columns are counted.
        """
        if torch.compiler.is_compiling():
            return cls("tensor", dtype), (x,)  # the partitioner decides what to recompute
        hooks = hooks_in_use()
        recording = None if hooks is None else recording_of(hooks)
        recalled = None if recording is None else recording.recall()
        if recalled is not None:
            recipe, as_it_is = cls(recalled[0], dtype), recalled[1]
        else:
            # Reading a saved tensor runs the unpack hook it was packed with; under non-reentrant
            # checkpointing that would recompute the producer in the middle of the forward. Under a
            # recording, what it has saved is not read before the backward.
            may_inspect = type(x) in _INSPECTED and (hooks is None or recording is not None)
            recipe, as_it_is = cls._chosen(x, dtype, columns, dim, recording, may_inspect)
            if recording is not None:
                recording.note((recipe.kind, as_it_is))  # not its producer, which leads to here
        if recipe.kind == "columns":
            assert columns is not None
            return recipe, (x.index_select(dim, columns).to(dtype),)
        if recipe.kind != "tensor":
            return recipe, ()
        # of the two dtypes the narrower: autocast has cast the input to it anyway
        is_cast = not as_it_is and dtype.itemsize < x.element_size()
        return recipe, (x.to(dtype) if is_cast else x,)

    @classmethod
    def _chosen(
        cls,
        x: Tensor,
        dtype: torch.dtype,
        columns: Tensor | None,
        dim: int,
        recording: Recording | None,
        may_inspect: bool,
    ) -> tuple[SavedInput, bool]:
        """What to keep, and whether a tensor that is kept is kept in its own dtype."""
        if may_inspect:
            node: Any = x.grad_fn
            if node is not None:
                rebuilt = _rebuilt(x, node, dtype)
                if rebuilt is not None:
                    return rebuilt, True
                is_recorded = recording is not None and recording.holds(x)
                if is_recorded or _is_kept_by_producer(x, node):
                    return cls("tensor", dtype), True
            # per element of the columns, against per element of the input in the narrower dtype
            whole = x.shape[dim] * min(dtype.itemsize, x.element_size())
            if columns is not None and columns.numel() * dtype.itemsize < whole:
                return cls("columns", dtype), True
        return cls("tensor", dtype), False

    def rebuild(self, tensors: Tensors) -> Tensor:
        """The input in the dtype of the computation; for `columns` just those of it."""
        if self.kind == "gelu":
            node = self.producer
            source = node._saved_self
            make = launch_gelu if may_launch(source) else rebuild_gelu
            x = make(source, node._saved_approximate, self.dtype)
        elif self.kind == "layer_norm":
            node = self.producer
            source = node._saved_input
            make_norm: Any = launch_layer_norm if may_launch(source) else rebuild_layer_norm
            x = make_norm(
                source,
                *(node._saved_result1, node._saved_result2),
                *(node._saved_weight, node._saved_bias),
                *(len(node._saved_normalized_shape), self.dtype),
            )
        elif self.kind == "function":
            x = self.producer.spt_rebuild_output(self.producer, self.dtype)
        else:
            (kept,) = tensors
            assert kept is not None
            x = made_again(kept if kept.dtype is self.dtype else kept.to(self.dtype))
        for kind, argument in self.steps:
            x = x.reshape(argument) if kind == "reshape" else x.permute(argument)
        return x


def _rebuilt(x: Tensor, node: Any, dtype: torch.dtype) -> SavedInput | None:
    """The recipe after a GELU, a LayerNorm, or a function of ours that is one; or None."""
    kind = _kind_of(node)
    steps: tuple[Step, ...] = ()
    if kind is None:
        below, output = _below_reshapes(node)
        kind = None if below is None or output != 0 else _kind_of(below)
        if kind is None:
            return None
        node, steps = below, _steps(x)
    elif x.output_nr != 0:  # such as the mean, which a LayerNorm gives as well
        return None
    # An edit in place under no_grad leaves the node as it is, and only the version tells of it
    if x._version != 0 or dtype not in _REBUILDABLE or x.dtype not in _REBUILDABLE:
        return None
    source = {"gelu": _OF_GELU, "layer_norm": _OF_LAYER_NORM}.get(kind)
    is_readable = _is_function_readable(node) if source is None else source.is_readable(node)
    return SavedInput(kind, dtype, node, steps) if is_readable else None


def _kind_of(node: Any) -> Kind | None:
    """Of which kind a node is, if what it keeps gives its output again."""
    kind = _PRODUCERS.get(node.name())
    return "function" if kind is None and hasattr(node, "spt_rebuild_output") else kind


def _below_reshapes(node: Any) -> tuple[Any, int]:
    """The first node below reshapes and permutations, and which of its outputs they go on with."""
    output = 0
    while node is not None and node.name() in _MOVES:
        node, output = node.next_functions[0]
    return node, output


def _steps(x: Tensor) -> tuple[Step, ...]:
    """The reshapes and permutations that `x` has come through, in the order of the forward."""
    node: Any = x.grad_fn
    shape = tuple(x.shape)
    steps: list[Step] = []
    while (name := node.name()) in _MOVES:
        if name in _RESHAPES:
            steps.append(("reshape", shape))
            shape = tuple(node._saved_self_sym_sizes)
        elif name == "PermuteBackward0":
            dims = tuple(d % len(shape) for d in _signed(node._saved_dims))
            steps.append(("permute", dims))
            shape = tuple(shape[dims.index(d)] for d in range(len(shape)))
        else:
            dims = _transposition(node, len(shape))
            steps.append(("permute", dims))
            shape = tuple(shape[d] for d in dims)
        node = node.next_functions[0][0]
    return tuple(reversed(steps))


def _transposition(node: Any, ndim: int) -> tuple[int, ...]:
    dims = list(range(ndim))
    first, second = (d % ndim for d in _signed((node._saved_dim0, node._saved_dim1)))
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _signed(dims: Any) -> tuple[int, ...]:
    # autograd nodes show a negative dimension as an unsigned 64-bit number
    return tuple(d - 2**64 if d >= 2**63 else d for d in map(int, dims))


def _is_kept_by_producer(x: Tensor, node: Any) -> bool:
    """Whether the node that made `x` keeps it for its own backward, so that saving it is free."""
    path = [node]
    while path[-1].name() in _VIEWS and (below := path[-1].next_functions[0][0]) is not None:
        path.append(below)
    chain = tuple(node.name() for node in path)
    if chain not in _WHERE_KEPT:
        # not to be remembered of nodes that could not be read
        if any(kept.read(node) is None for node in path for kept in _kept_of(node)):
            return False
        _WHERE_KEPT[chain] = _where_kept(x, path)
    place = _WHERE_KEPT[chain]
    return place is not None and _shares_storage(x, place.kept.read(path[place.depth]))


def _where_kept(x: Tensor, path: list[Any]) -> _Place | None:
    for depth, node in enumerate(path):
        for kept in _kept_of(node):
            if _shares_storage(x, kept.read(node)):
                return _Place(depth, kept)
    return None


def _shares_storage(x: Tensor, saved: tuple[Any] | None) -> bool:
    tensor = None if saved is None else saved[0]
    if not isinstance(tensor, Tensor):
        return False
    return tensor.untyped_storage()._cdata == x.untyped_storage()._cdata


class _Kept:
    """One of the things that a node saves, by its name without prefix."""

    def __init__(self, name: str) -> None:
        self._raw, self._saved = attrgetter(f"_raw_saved_{name}"), attrgetter(f"_saved_{name}")

    def is_readable(self, node: Any) -> bool:
        """Whether a backward may read what a node saves, without more than its being recorded."""
        try:
            raw = self._raw(node)
        except RuntimeError:
            return False
        if raw is not None and getattr(raw, "unpack_hook", None) is unpack:
            return True
        found = self.read(node)
        return found is not None and found[0] is not None

    def read(self, node: Any) -> tuple[Any] | None:
        """What a node saves; None when it cannot be had without side effects."""
        try:
            raw = self._raw(node)
            if raw is not None and _may_have_hooks(raw):
                return None
            return (self._saved(node),)
        except RuntimeError:
            # Freed by a backward, or edited in place since: this graph can no longer be gone
            # through, but the forward, as with a plain layer, must still run.
            return None


# what one node saves was saved at one time, under the same hooks, and is freed at one time
_OF_GELU, _OF_LAYER_NORM = _Kept("self"), _Kept("input")


def _kept_of(node: Any) -> tuple[_Kept, ...]:
    return _kept_by(type(node))  # type: ignore[arg-type]


@functools.cache
def _kept_by(node_type: Hashable) -> tuple[_Kept, ...]:
    """What a type of C++ node saves, its results first."""
    prefix = "_raw_saved_"
    names = [name.removeprefix(prefix) for name in dir(node_type) if name.startswith(prefix)]
    names.sort(key=lambda name: not name.startswith(("out", "result")))
    return tuple(_Kept(name) for name in names if hasattr(node_type, f"_saved_{name}"))


def _is_function_readable(node: Any) -> bool:
    """Whether a backward may read what a function saved, beside the function's own reading of it.

    A checkpoint that holds the function alone, and not the layer, gives each tensor once.
    """
    try:
        every = node._raw_saved_tensors
    except RuntimeError:  # freed by a backward
        return False
    return all(
        raw is None or not _may_have_hooks(raw) or getattr(raw, "unpack_hook", None) is unpack
        for raw in every
    )


def _may_have_hooks(raw: Any) -> bool:
    # Before 2.11 (2.9 for one) torch does not tell, and then nothing is rebuilt
    return not hasattr(raw, "unpack_hook") or raw.unpack_hook is not None


class _Place(NamedTuple):
    """Which node of a path keeps an activation, and under which name."""

    depth: int
    kept: _Kept


# By the names of the nodes that an activation comes from: what they keep is a matter of their kinds
_WHERE_KEPT: dict[tuple[str, ...], _Place | None] = {}
