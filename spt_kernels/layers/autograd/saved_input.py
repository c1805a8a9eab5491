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

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ...ops.dtypes import FLOATS
from ...ops.launching import is_plain
from ...ops.rebuild_input import launch_gelu, launch_layer_norm, rebuild_gelu, rebuild_layer_norm
from ...ops.torch_internals import hooks_in_use, is_backward_compiled
from .graph_nodes import NODE_TYPES, KeptLayerNorm, is_kept, way_to
from .recording import Recording, recording_of
from .traced import made_again

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
        return cls.eager(x, dtype, columns, dim)

    @classmethod
    def eager(
        cls, x: Tensor, dtype: torch.dtype, columns: Tensor | None = None, dim: int = -1
    ) -> tuple[SavedInput, Tensors]:
        """`of` for those who know that nothing is compiled here."""
        hooks = hooks_in_use()
        if hooks is None and type(x) in _INSPECTED:
            # what nearly every layer comes to, without a frame: right behind a GELU or LayerNorm
            node: Any = x.grad_fn
            made_by: Any = NODE_TYPES[type(node)]
            if (
                made_by.is_rebuilt
                and x._version == 0
                and x.output_nr == 0
                and made_by.source.is_readable(node)
                and dtype in FLOATS
                and x.dtype in FLOATS
                and not is_backward_compiled()
            ):
                return _new(cls, (made_by.kind, dtype, node, ())), ()
        if hooks is None:
            recipe, as_it_is = _chosen(x, dtype, columns, dim, None)
        else:
            recipe, as_it_is = _chosen_under_hooks(x, dtype, columns, dim, recording_of(hooks))
        kind = recipe[0]
        if kind == "columns":
            assert columns is not None
            return recipe, (x.index_select(dim, columns).to(dtype),)
        if kind != "tensor":
            return recipe, ()
        # of the two dtypes the narrower: autocast has cast the input to it anyway
        is_cast = not as_it_is and dtype.itemsize < x.element_size()
        return recipe, (x.to(dtype) if is_cast else x,)

    def rebuild(self, tensors: Tensors) -> Tensor:
        """The input in the dtype of the computation; for `columns` just those of it."""
        kind, dtype = self.kind, self.dtype
        if kind == "layer_norm":
            x = _layer_norm_again(self.producer, dtype)
        elif kind == "gelu":
            x = _gelu_again(self.producer, dtype)
        elif kind == "function":
            x = self.producer.spt_rebuild_output(self.producer, dtype)
        else:
            (kept,) = tensors
            assert kept is not None
            return made_again(kept if kept.dtype is dtype else kept.to(dtype))
        for step, argument in self.steps:
            x = x.reshape(argument) if step == "reshape" else x.permute(argument)
        return x


class RebuildingFunction(torch.autograd.Function):
    """An autograd function that keeps a `SavedInput`, or None, as `ctx.saved_input`."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> Any:
        """What compiled autograd asks for before it takes from the graph what that has saved."""
        if ctx.saved_input is not None and ctx.saved_input.producer is not None:
            raise RuntimeError(
                "compiled autograd takes from the graph what a tuned layer makes its input of "
                "again: turn it on before the forward, which then keeps the input"
            )
        return torch.autograd.Function._compiled_autograd_key(ctx)


def _layer_norm_again(node: Any, dtype: torch.dtype) -> Tensor:
    kept = KeptLayerNorm.of(node)
    make: Any = launch_layer_norm if is_plain(kept.input) else rebuild_layer_norm
    return make(*kept, dtype)  # type: ignore[no-any-return]


def _gelu_again(node: Any, dtype: torch.dtype) -> Tensor:
    source, approximate = node._saved_self, node._saved_approximate
    if source.dtype is dtype:
        return F.gelu(source, approximate=approximate)  # the very call of the forward
    make = launch_gelu if is_plain(source) else rebuild_gelu
    return make(source, approximate, dtype)


def _chosen_under_hooks(
    x: Tensor,
    dtype: torch.dtype,
    columns: Tensor | None,
    dim: int,
    recording: Recording | None,
) -> tuple[SavedInput, bool]:
    """`_chosen` where something else than autograd decides what is kept of what is saved.

    Reading a saved tensor runs the unpack hook it was packed with; under non-reentrant
    checkpointing that would recompute the producer in the middle of the forward. Under a recording,
    what it has saved is not read before the backward.
    """
    if recording is None:
        return SavedInput("tensor", dtype), False
    recalled = recording.recall()
    if recalled is not None:
        return SavedInput(recalled[0], dtype), recalled[1]
    recipe, as_it_is = _chosen(x, dtype, columns, dim, recording)
    recording.note((recipe.kind, as_it_is))  # not its producer, which leads to here
    return recipe, as_it_is


def _chosen(
    x: Tensor,
    dtype: torch.dtype,
    columns: Tensor | None,
    dim: int,
    recording: Recording | None,
) -> tuple[SavedInput, bool]:
    """What to keep, and whether a tensor that is kept is kept in its own dtype."""
    if type(x) not in _INSPECTED:
        return SavedInput("tensor", dtype), False
    node: Any = x.grad_fn
    if node is not None:
        node_type = NODE_TYPES[type(node)]
        if node_type.is_view:
            way, types, output, is_moved_alone = way_to(node)
            producer, producer_type = way[-1], types[-1]
        else:
            way, types, output, is_moved_alone = (node,), (node_type,), x.output_nr, True
            producer, producer_type = node, node_type
        source = producer_type.source
        # An edit in place under no_grad leaves the node as it is, and only the version tells of it;
        # outputs after the first are others, such as the mean, which a LayerNorm gives as well
        if (
            source is not None
            and output == 0
            and is_moved_alone
            and x._version == 0
            and (producer_type.kind != "function" or hasattr(producer, "spt_rebuild_output"))
            and source.is_readable(producer)
            and dtype in FLOATS
            and x.dtype in FLOATS
            and not is_backward_compiled()
        ):
            steps = _steps(x) if node_type.is_view else ()
            return _new(SavedInput, (producer_type.kind, dtype, producer, steps)), True
        is_free = is_kept(x, way, types, output)
        if is_free or (recording is not None and recording.holds(x)):
            return _new(SavedInput, ("tensor", dtype, None, ())), True
    # per element of the columns, against per element of the input in the narrower dtype
    if columns is not None:
        whole = x.shape[dim] * min(dtype.itemsize, x.element_size())
        if columns.numel() * dtype.itemsize < whole:
            return SavedInput("columns", dtype), True
    return SavedInput("tensor", dtype), False


_new = tuple.__new__  # without the frame that a constructor in Python is


def _steps(x: Tensor) -> tuple[Step, ...]:
    """The reshapes and permutations that `x` has come through, in the order of the forward."""
    node: Any = x.grad_fn
    shape = tuple(x.shape)
    steps: list[Step] = []
    while (node_type := NODE_TYPES[type(node)]).is_move:
        if node_type.is_reshape:
            steps.append(("reshape", shape))
            shape = tuple(node._saved_self_sym_sizes)
        elif node_type.name == "PermuteBackward0":
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
