"""`SavedInput`: what a layer keeps of its input for the backward, and how the input is had again.

The activation itself is kept only when nothing better is at hand. After a GELU or a LayerNorm the
autograd graph holds the producer's own input anyway; those tensors are saved a second time (the
same storages, and autograd checks their versions) and one elementwise pass gives the input back.

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
from .traced import made_again

_RESHAPES = frozenset({"ViewBackward0", "ReshapeAliasBackward0"})
# Nodes that may lie between a tensor and the node whose output it shares its storage with
_VIEWS = frozenset(
    {"AliasBackward0", "AsStridedBackward0", "ExpandBackward0", "PermuteBackward0"}
    | {"SelectBackward0", "TransposeBackward0", "UnsqueezeBackward0"}
    | {"SliceBackward0", "SplitBackward0", "SqueezeBackward0", "SqueezeBackward1"}
    | {"TBackward0", "UnbindBackward0", "UnsafeViewBackward0"}
    | _RESHAPES
)
_PRODUCERS = frozenset({"GeluBackward0", "NativeLayerNormBackward0"})
_REBUILDABLE = (torch.float32, torch.bfloat16, torch.float16)
# Tensors that are what autograd takes them for; other subclasses may be anything
_INSPECTED: tuple[type[Tensor], ...] = (Tensor, torch.nn.Parameter, FakeTensor)

Tensors = tuple[Tensor | None, ...]
Step = tuple[Literal["reshape", "permute"], tuple[int, ...]]


class SavedInput(NamedTuple):
    """A recipe for a layer's input from a few saved tensors, which it does not hold itself.

    Attributes:
        kind: `tensor` (the input itself), `columns` (some of one dimension of it), `gelu` or
            `layer_norm` (what their producer keeps).
        dtype: of the input as the layer computes with it.
        approximate: of a GELU.
        normalized_ndim: of a LayerNorm.
        steps: reshapes and permutations between the producer's output and the layer.
    """

    kind: Literal["tensor", "columns", "gelu", "layer_norm"]
    dtype: torch.dtype
    approximate: str = "none"
    normalized_ndim: int = 0
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
        if _may_inspect(x):
            rebuilt = _rebuilt(x, dtype)
            if rebuilt is not None:
                return rebuilt
            if _is_kept_by_producer(x):
                return cls("tensor", dtype), (x,)
            # per element of the columns, against per element of the input in the narrower dtype
            whole = x.shape[dim] * min(dtype.itemsize, x.element_size())
            if columns is not None and columns.numel() * dtype.itemsize < whole:
                return cls("columns", dtype), (x.index_select(dim, columns).to(dtype),)
        # of the two dtypes the narrower: autocast has cast the input to it anyway
        return cls("tensor", dtype), (x.to(dtype) if dtype.itemsize < x.element_size() else x,)

    def rebuild(self, tensors: Tensors) -> Tensor:
        """The input in the dtype of the computation; for `columns` just those of it."""
        source = tensors[0]
        assert source is not None
        if self.kind == "gelu":
            make = launch_gelu if may_launch(source) else rebuild_gelu
            x = make(source, self.approximate, self.dtype)
        elif self.kind == "layer_norm":
            make_norm: Any = launch_layer_norm if may_launch(source) else rebuild_layer_norm
            x = make_norm(*tensors, self.normalized_ndim, self.dtype)
        else:
            x = made_again(source if source.dtype is self.dtype else source.to(self.dtype))
        for kind, argument in self.steps:
            x = x.reshape(argument) if kind == "reshape" else x.permute(argument)
        return x


def _may_inspect(x: Tensor) -> bool:
    # Reading a saved tensor runs the unpack hook it was packed with; under non-reentrant
    # checkpointing that would recompute the producer in the middle of the forward.
    return (
        type(x) in _INSPECTED and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def _rebuilt(x: Tensor, dtype: torch.dtype) -> tuple[SavedInput, Tensors] | None:
    """The recipe after a GELU or a LayerNorm, and what it starts from; or None."""
    # An edit in place under no_grad leaves the node as it is, and only the version tells of it
    if x.grad_fn is None or x.is_inference() or x._version != 0 or dtype not in _REBUILDABLE:
        return None
    node: Any = x.grad_fn
    steps: tuple[Step, ...] = ()
    kind = node.name()
    if kind not in _PRODUCERS:
        node, steps = _look_through(x)
        kind = "" if node is None else node.name()
    if kind == "GeluBackward0":
        saved = _OF_GELU.read(node)
        recipe = SavedInput("gelu", dtype, getattr(node, "_saved_approximate", "none"), steps=steps)
    elif kind == "NativeLayerNormBackward0":
        saved = _OF_LAYER_NORM.read(node)
        normalized_ndim = len(node._saved_normalized_shape)
        recipe = SavedInput("layer_norm", dtype, normalized_ndim=normalized_ndim, steps=steps)
    else:
        return None
    if saved is None or not all(t is None or t.dtype in _REBUILDABLE for t in saved):
        return None
    source = saved[0]
    if source is None or source.dtype != x.dtype or source.numel() != x.numel():
        return None
    return recipe, saved


def _look_through(x: Tensor) -> tuple[Any, tuple[Step, ...]]:
    """The node below reshapes and permutations, and these, in the order of the forward."""
    node: Any = x.grad_fn
    shape = tuple(x.shape)
    steps: list[Step] = []
    while node is not None:
        name = node.name()
        if name in _RESHAPES:
            steps.append(("reshape", shape))
            shape = tuple(node._saved_self_sym_sizes)
        elif name == "PermuteBackward0":
            dims = tuple(d % len(shape) for d in _signed(node._saved_dims))
            steps.append(("permute", dims))
            shape = tuple(shape[dims.index(d)] for d in range(len(shape)))
        elif name == "TransposeBackward0":
            dims = _transposition(node, len(shape))
            steps.append(("permute", dims))
            shape = tuple(shape[d] for d in dims)
        else:
            break
        node, output = node.next_functions[0]
        if output != 0:
            return None, ()
    return node, tuple(reversed(steps))


def _transposition(node: Any, ndim: int) -> tuple[int, ...]:
    dims = list(range(ndim))
    first, second = (d % ndim for d in _signed((node._saved_dim0, node._saved_dim1)))
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _signed(dims: Any) -> tuple[int, ...]:
    # autograd nodes show a negative dimension as an unsigned 64-bit number
    return tuple(d - 2**64 if d >= 2**63 else d for d in map(int, dims))


def _is_kept_by_producer(x: Tensor) -> bool:
    """Whether the node that made `x` keeps it for its own backward, so that saving it is free."""
    storage = x.untyped_storage()._cdata
    node: Any = x.grad_fn
    while node is not None:
        for names in _saved_names(type(node)):  # type: ignore[arg-type]
            for saved in names.read(node) or ():
                if isinstance(saved, Tensor) and saved.untyped_storage()._cdata == storage:
                    return True
        if node.name() not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return False


class _Names:
    """Names of what a node saves, without their prefix, to be read all at once."""

    def __init__(self, *names: str) -> None:
        self._raw = attrgetter(f"_raw_saved_{names[0]}")
        saved = attrgetter(*(f"_saved_{name}" for name in names))
        # the getter of one name alone gives no tuple
        self._saved = saved if len(names) > 1 else lambda node: (saved(node),)

    def read(self, node: Any) -> tuple[Any, ...] | None:
        """Saved tensors of a node, or None when they cannot be had without side effects."""
        try:
            # those of one node were saved at one time, under the same hooks
            raw = self._raw(node)
            if raw is not None and _may_have_hooks(raw):
                return None
            saved: tuple[Any, ...] = self._saved(node)
            return saved
        except RuntimeError:
            # Freed by a backward, or edited in place since: this graph can no longer be gone
            # through, but the forward, as with a plain layer, must still run.
            return None


_OF_GELU = _Names("self")
_OF_LAYER_NORM = _Names("input", "result1", "result2", "weight", "bias")


@functools.cache
def _saved_names(node_type: Hashable) -> tuple[_Names, ...]:
    """What a type of C++ node saves, its results first."""
    prefix = "_raw_saved_"
    names = [name.removeprefix(prefix) for name in dir(node_type) if name.startswith(prefix)]
    names.sort(key=lambda name: not name.startswith(("out", "result")))
    return tuple(_Names(name) for name in names if hasattr(node_type, f"_saved_{name}"))


def _may_have_hooks(raw: Any) -> bool:
    # Before 2.11 (2.9 for one) torch does not tell, and then nothing is rebuilt
    return not hasattr(raw, "unpack_hook") or raw.unpack_hook is not None
