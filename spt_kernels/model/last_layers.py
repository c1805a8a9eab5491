"""Which parameters come last on the way from a model to its loss, read from the autograd graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# A node of autograd's graph, which has no public type, and one of its results
_Node = Any
_Edge = tuple[_Node, int]

_CONTRACTION = re.compile(r"mm|Mm|mv|Mv|Dot|Convolution|Linear")
# what takes parameters without multiplying features by a matrix
_NO_MATRIX = re.compile(
    r"^(?:Add(?!b?mm|mv)|Sub|Rsub|Mul|Div|Cat|Stack|Where|Masked|Index|Gather|Embedding|Expand|Max|Min|"
    r"Addcmul|Addcdiv|Lerp|Prelu|CopySlices|ScaledDot)|Norm"
)
_EMBEDDING = re.compile(r"^Embedding")
_NORM = re.compile(r"Norm(?!Interface)")  # WeightNormInterface is no norm of features
# what hidden layers end with; a sigmoid or tanh may belong to the task instead
_ACTIVATION = re.compile(
    r"^(?:Relu|LeakyRelu|Gelu|Silu|Elu|Celu|Selu|Hardswish|Hardtanh|Mish|Prelu|Threshold|Rrelu)"
)
# what a loss does to scores of classes and to nothing else
_OF_SCORES = re.compile(r"Softmax|NllLoss|Logsumexp|Sigmoid|BinaryCrossEntropy")


def last_parameters(
    loss: Tensor,
    outputs: Collection[Tensor],
    inputs: Collection[Tensor],
    parameters: Mapping[str, Tensor],
    norms: Collection[str],
) -> tuple[str, ...]:
    """Name the parameters of the last layers on the way to each output that the loss reads.

    Of one output these are the matrices (of a Linear, a convolution, a bare product) that nothing
    with a matrix comes after, and whatever scales or shifts their result. An output that a norm, or
    the activation of a hidden layer, comes after holds features, and has none; so has one to which
    a way leads past these matrices from other layers, as a residual branch does.

    Args:
        loss: of the very graph that made the outputs.
        outputs: of the model; those that the loss does not read play no role.
        inputs: floating tensors that the model was given, as leaves that require a gradient.
        parameters: of the model, by name, each a leaf that requires a gradient.
        norms: names among them that belong to norms.
    """
    if loss.grad_fn is None:
        return ()
    boundary = {(o.grad_fn, o.output_nr) for o in outputs if o.grad_fn is not None}
    roots, scored = _read_by(loss, boundary)
    graph = _Graph([node for node, _ in roots], parameters, inputs)
    found: set[str] = set()
    for node, _ in roots:
        found |= _last_before(node, graph, parameters, frozenset(norms), scored)
    return tuple(name for name in parameters if name in found)


def _read_by(loss: Tensor, boundary: set[_Edge]) -> tuple[list[_Edge], bool]:
    """The outputs that a loss reads, and whether it takes them for scores of classes."""
    start: _Edge = (loss.grad_fn, loss.output_nr)
    if start in boundary:
        return [start], False
    read: dict[_Edge, None] = {}
    scored = False
    seen, waiting = {start[0]}, [start[0]]
    while waiting:
        node = waiting.pop()
        scored |= bool(_OF_SCORES.search(node.name()))
        for edge in node.next_functions:
            if edge in boundary:
                read[edge] = None
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                waiting.append(edge[0])
    return list(read), scored


@dataclass
class _Ahead:
    """What lies between an output and the last layers before it.

    Attributes:
        matrices: the nodes of these layers, with the names of their parameters.
        besides: names of what scales or shifts their result.
        activated: whether the activation of a hidden layer is there.
        scored: whether something is there that is only done to scores.
        normed: whether a norm with parameters is.
    """

    matrices: dict[_Node, frozenset[str]] = field(default_factory=dict)
    besides: set[str] = field(default_factory=set)
    activated: bool = False
    scored: bool = False
    normed: bool = False


def _last_before(
    root: _Node,
    graph: _Graph,
    parameters: Mapping[str, Tensor],
    norms: Collection[str],
    scored: bool,
) -> frozenset[str]:
    """The names for one output; empty when that holds features."""
    ahead = _look_ahead(root, graph, parameters, norms)
    if ahead.normed or not ahead.matrices or _is_passed_by(ahead.matrices, graph):
        return frozenset()
    names = frozenset().union(*ahead.matrices.values())
    if ahead.activated and not (scored or ahead.scored):
        sizes = [parameters[name].shape[:2] for name in names if parameters[name].ndim > 1]
        if any(rows >= columns for rows, columns in sizes):  # does not narrow to a few numbers
            return frozenset()
    return names | ahead.besides


def _look_ahead(
    root: _Node, graph: _Graph, parameters: Mapping[str, Tensor], norms: Collection[str]
) -> _Ahead:
    ahead = _Ahead()
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if node not in graph.data:
            continue
        name, fed = node.name(), graph.fed(node)
        has_matrix = any(parameters[n].ndim > 1 for n in fed)
        if fed and has_matrix and not _NO_MATRIX.search(name):
            ahead.matrices[node] = fed
            continue
        if fed and (_NORM.search(name) or not fed.isdisjoint(norms)):
            ahead.normed = True
            break
        ahead.besides |= fed
        ahead.activated |= bool(_ACTIVATION.search(name))
        ahead.scored |= bool(_OF_SCORES.search(name))
        for child in graph.children[node]:
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return ahead


def _is_passed_by(matrices: Mapping[_Node, frozenset[str]], graph: _Graph) -> bool:
    """Whether one of these nodes comes before another of other parameters."""
    for first, names in matrices.items():
        seen, waiting = {first}, [first]
        while waiting:
            for child in graph.children[waiting.pop()]:
                if child in seen or child not in graph.data:
                    continue
                if not matrices.get(child, names) <= names:
                    return True
                seen.add(child)
                waiting.append(child)
    return False


class _Graph:
    """What leads to some nodes: features, which come from the input, and parameters.

    Attributes:
        children: node -> the nodes whose results it was given.
        data: nodes that features pass through; the others are made of parameters alone.
    """

    def __init__(
        self, roots: Iterable[_Node], parameters: Mapping[str, Tensor], inputs: Collection[Tensor]
    ) -> None:
        self.children: dict[_Node, list[_Node]] = {}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        order = self._walk(roots)
        leaves = {id(leaf) for leaf in inputs}
        inputs_reached = {n for n in order if id(getattr(n, "variable", None)) in leaves}
        # words and other indices have no gradient: they come in through embeddings
        sources = inputs_reached | {n for n in order if _EMBEDDING.search(n.name())}
        if not inputs_reached:
            # nor have features that were computed without gradients, or pixels in bytes
            sources |= {n for n in order if _CONTRACTION.search(n.name()) and _lacks(n)}
        self.data: set[_Node] = set()
        self._made_of: dict[_Node, frozenset[str]] = {}
        nothing: frozenset[str] = frozenset()
        for node in order:  # children first
            children = self.children[node]
            if node in sources or any(child in self.data for child in children):
                self.data.add(node)
            name = self._names.get(id(getattr(node, "variable", None)))
            own = nothing if name is None else frozenset({name})
            self._made_of[node] = own.union(
                *(self._made_of[child] for child in children if child not in self.data)
            )

    def fed(self, node: _Node) -> frozenset[str]:
        """Names of the parameters that a node of features is given, or what is made of them."""
        return self._made_of[node]

    def _walk(self, roots: Iterable[_Node]) -> list[_Node]:
        """All nodes that lead to the roots, each after those that lead to it."""
        order: list[_Node] = []
        waiting = [(root, False) for root in roots]
        while waiting:
            node, is_done = waiting.pop()
            if is_done:
                order.append(node)
            elif node not in self.children:
                self.children[node] = [n for n, _ in node.next_functions if n is not None]
                waiting.append((node, True))
                waiting += [(child, False) for child in self.children[node]]
        return order


def _lacks(node: _Node) -> bool:
    return any(child is None for child, _ in node.next_functions)
