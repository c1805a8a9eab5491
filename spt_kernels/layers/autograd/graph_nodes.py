"""What nodes of the autograd graph are and keep, by their types: one lookup tells it of each.

A layer asks where its input comes from in every step, and on a fast card a step takes as long as
its host does.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ...ops.torch_internals import is_alias_of
from .recording import unpack

_RESHAPES = frozenset({"ViewBackward0", "ReshapeAliasBackward0"})
_MOVES = frozenset({"PermuteBackward0", "TransposeBackward0"}) | _RESHAPES
# Nodes that may lie between a tensor and the node whose output it shares its storage with
_VIEWS = frozenset(
    {"AliasBackward0", "AsStridedBackward0", "ExpandBackward0", "SelectBackward0"}
    | {"SliceBackward0", "SplitBackward0", "SqueezeBackward0", "SqueezeBackward1"}
    | {"TBackward0", "UnbindBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0"}
    | _MOVES
)
_RAW = "_raw_saved_"

Kind = Literal["gelu", "layer_norm", "function"]

# What unpacks a tensor that a node keeps (torch's `SavedTensor`); None where it lies there itself
hook_of = attrgetter("unpack_hook")
# Of a graph that a backward has freed, or of which something was edited in place since, nothing can
# be read, but the forward, as with a plain layer, must still run. Before 2.11 (2.9 for one) torch
# does not tell of hooks, and then nothing is rebuilt; nor has None any.
UNREADABLE = (RuntimeError, AttributeError)


def tells_what_is_kept() -> bool:
    """Whether this torch lets a layer see what a GELU before it keeps, without side effects."""
    with torch.enable_grad():
        node = torch.nn.functional.gelu(torch.ones(1, requires_grad=True)).grad_fn
    return Kept("self").is_readable(node)


class Kept:
    """One of the things that nodes of a type keep, by its name without prefix."""

    __slots__ = ("_raw", "_saved")

    def __init__(self, name: str) -> None:
        self._raw, self._saved = attrgetter(f"{_RAW}{name}"), attrgetter(f"_saved_{name}")

    def is_readable(self, node: Any) -> bool:
        """Whether a backward may read it, without more than its being recorded."""
        try:
            hook = hook_of(self._raw(node))
            return self._saved(node) is not None if hook is None else hook is unpack
        except UNREADABLE:
            return False

    def lies_there(self, node: Any) -> bool:
        """Whether the node itself has it, and no hook has put it elsewhere."""
        try:
            return hook_of(self._raw(node)) is None
        except UNREADABLE:
            return False

    def read(self, node: Any) -> tuple[Any] | None:
        """What it is; None when it cannot be had without side effects."""
        try:
            raw = self._raw(node)
            is_packed = raw is not None and hook_of(raw) is not None
            return None if is_packed else (self._saved(node),)
        except UNREADABLE:
            return None


class KeptBySelf:
    """What an autograd function of ours keeps, all of it."""

    __slots__ = ()

    @staticmethod
    def is_readable(node: Any) -> bool:
        """Whether a backward may read it, beside that of the function itself.

        A checkpoint that holds the function alone, and not the layer, gives each tensor once.
        """
        try:
            hooks = [hook_of(raw) for raw in node._raw_saved_tensors if raw is not None]
        except UNREADABLE:
            return False
        return all(hook is None or hook is unpack for hook in hooks)


class KeptLayerNorm(NamedTuple):
    """What a LayerNorm keeps, from which its output is had again.

    Attributes:
        input: `[..., *normalized]`.
        mean: one per row.
        rstd: one per row, reciprocal standard deviation.
        weight: `[*normalized]`, or None.
        bias: `[*normalized]`, or None.
        normalized_ndim: how many trailing dimensions are normalized.
    """

    input: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    normalized_ndim: int

    @classmethod
    def of(cls, node: Any) -> KeptLayerNorm:
        """Read from a node whose kind is `layer_norm`, in a backward that has not come to it."""
        input, mean, rstd, weight, bias = tensors_of_layer_norm(node)
        is_ours = isinstance(node, BackwardCFunction)
        normalized = node.call.shape if is_ours else node._saved_normalized_shape
        return cls(input, mean, rstd, weight, bias, len(normalized))


def tensors_of_layer_norm(node: Any) -> Any:
    """Those of `KeptLayerNorm.of`, without the dimensions, which take as long to ask for again."""
    if isinstance(node, BackwardCFunction):
        return node.saved_tensors
    return _kept_by_torchs(node)


_kept_by_torchs = attrgetter(
    *("_saved_input", "_saved_result1", "_saved_result2", "_saved_weight", "_saved_bias")
)


class NodeType:
    """What is so of all nodes of one type.

    Attributes:
        name: of the type.
        kind: of what can have the means to give its output again: a GELU, a LayerNorm, an autograd
            function in Python; None for all others.
        source: what it has for that, and whether it may be read.
        is_reshape: the output is the input in another shape.
        is_move: it is that, or a permutation.
        is_view: it may share its storage with the input.
        is_rebuilt: it is a GELU or a LayerNorm of torch, whose output can be had again.
        kept: what such nodes keep, results first.
    """

    __slots__ = ("is_move", "is_rebuilt", "is_reshape", "is_view", "kept", "kind", "name", "source")

    def __init__(self, node_type: type, kind: Kind | None = None) -> None:
        self.name = node_type.__name__
        self.kind: Kind | None
        self.source: Kept | KeptBySelf | None
        self.kind, self.source = _SOURCES.get(self.name, (None, None))
        self.is_rebuilt = self.source is not None
        if kind is not None:
            self.kind, self.source = kind, KeptBySelf()
        self.is_reshape = self.name in _RESHAPES
        self.is_move, self.is_view = self.name in _MOVES, self.name in _VIEWS
        names = [name.removeprefix(_RAW) for name in dir(node_type) if name.startswith(_RAW)]
        names.sort(key=lambda name: not name.startswith(("out", "result")))
        self.kept = tuple(Kept(name) for name in names if hasattr(node_type, f"_saved_{name}"))


# what one node saves was saved at one time, under the same hooks, and is freed at one time
_SOURCES: dict[str, tuple[Kind, Kept]] = {
    "GeluBackward0": ("gelu", Kept("self")),
    "NativeLayerNormBackward0": ("layer_norm", Kept("input")),
}


class _NodeTypes(dict[type, NodeType]):
    """By the type of a node; those of functions in Python, which may be made anew, are not held."""

    def __missing__(self, node_type: type) -> NodeType:
        if issubclass(node_type, BackwardCFunction):
            function = getattr(node_type, "_forward_cls", None)
            return _FUNCTIONS[getattr(function, "spt_kind", "function")]
        found = self[node_type] = NodeType(node_type)
        return found


NODE_TYPES = _NodeTypes()
_KINDS: tuple[Kind, ...] = ("function", "layer_norm")
_FUNCTIONS = {kind: NodeType(BackwardCFunction, kind) for kind in _KINDS}


def way_to(node: Any) -> tuple[tuple[Any, ...], tuple[NodeType, ...], int, bool]:
    """Where a tensor that is a view comes from.

    Args:
        node: its own.

    Returns:
        The way: that node and those below it, up to the first that is no view. Their types. Of
        which output of the last one the tensor is a view. Whether all before it are moves.
    """
    found = NODE_TYPES[type(node)]
    way, types, output, is_moved_alone = [node], [found], 0, True
    while found.is_view:
        below, output_below = node.next_functions[0]
        if below is None:
            break
        is_moved_alone = is_moved_alone and found.is_move
        node, output, found = below, output_below, NODE_TYPES[type(below)]
        way.append(node)
        types.append(found)
    return tuple(way), tuple(types), output, is_moved_alone


def is_kept(x: Tensor, way: tuple[Any, ...], types: tuple[NodeType, ...], output: int) -> bool:
    """Whether a node on the way of `x` keeps it for its own backward, so that saving it is free.

    Which node that is is a matter of the types on the way, and read from the first such way alone:
    to read it takes a host as long as a product. Should a node have kept it that time alone, no
    more is lost than memory.

    Args:
        x: an activation.
        way: its, from `way_to`, as all that follows.
        types: of the nodes.
        output: of which output of the last node it is a view.
    """
    place = _PLACES.get((types, output), _UNKNOWN)
    if place is _UNKNOWN:
        # not to be remembered of nodes that could not be read
        for node, node_type in zip(way, types, strict=True):
            if any(kept.read(node) is None for kept in node_type.kept):
                return False
        place = _PLACES[types, output] = _place(x, way, types)
    return place is not None and place[1].lies_there(way[place[0]])


# Which node of a way keeps an activation, by the types on it and the output that it begins with
_PLACES: dict[tuple[tuple[NodeType, ...], int], tuple[int, Kept] | None] = {}
_UNKNOWN: Any = object()


def _place(x: Tensor, way: tuple[Any, ...], types: tuple[NodeType, ...]) -> tuple[int, Kept] | None:
    for depth, node in enumerate(way):
        for kept in types[depth].kept:
            if _shares_storage(x, kept.read(node)):
                return depth, kept
    return None


def _shares_storage(x: Tensor, saved: tuple[Any] | None) -> bool:
    tensor = None if saved is None else saved[0]
    return isinstance(tensor, Tensor) and is_alias_of(tensor, x)
