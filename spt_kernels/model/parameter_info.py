"""What one parameter of a model is: its kind, the operations of its rows, and its block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from ..files.json_kinds import COUNTS, FLAG, SIZE, TEXT, Kinds, check
from ..files.json_kinds import Kind as JsonKind
from .plain_layer import is_class_of_linears, runs_as_conv2d
from .quantized import is_of_a_quantizer, is_quantized, logical_shape, matrix_of

Kind = Literal["linear", "pointwise", "functional", "conv2d", "norm", "bias", "other"]

_FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "qk": ("q", "k")}
_SEPARATE = {
    **dict.fromkeys(("q_proj", "query", "to_q", "q_linear"), "q"),
    **dict.fromkeys(("k_proj", "key", "to_k", "k_linear"), "k"),
    **dict.fromkeys(("v_proj", "value", "to_v", "v_linear"), "v"),
}
_BLOCK = re.compile(
    r"(?:(?:blocks|layers?|stages?|resblocks|h)\d*\.\d+|encoder_layer_\d+|features\.\d+\.\d+)$"
)
_TRANSPOSED = "transformers.pytorch_utils.Conv1D"
_FUSED_PARTS = ("linear1", "linear2", "norm1", "norm2")
_NORM_NAME = re.compile(r"norm|(?:^|[._])(?:bn|ln)\d*(?:$|[._])", re.IGNORECASE)


@dataclass(frozen=True)
class RowBlock:
    """Rows `start:stop` (along dimension 0) of a parameter that serve one operation."""

    operation: str
    start: int
    stop: int


@dataclass(frozen=True)
class ParameterInfo:
    """What one parameter is, as far as allocation and tuning need to know.

    Attributes:
        kind: `linear` or `conv2d` (the weight of such a module), `pointwise` (that of a Conv2d
            which is a matrix on the channels of each position), `functional` (the weight of a
            Linear or of such a Conv2d that other code reads, or whose class has a forward of its
            own, so that no LoRA or Adapter can stand for the layer; or that of a transposed Linear,
            as GPT-2's `Conv1D` is), `norm` (weight or bias of a norm), `bias` (of a Linear or
            Conv2d), or `other` (tokens, tables, layer scales, ...).
        shape: the parameter's shape.
        row_blocks: its rows by operation; several for a fused matrix (q, k, v), otherwise one.
        groups: of a convolution.
        block: the block of the model that owns it, as `blocks.0` or `stages.2.blocks.1`; or "".
        reads: whether the model was seen to use it otherwise than by calls of its module.
    """

    kind: Kind
    shape: tuple[int, ...]
    row_blocks: tuple[RowBlock, ...]
    groups: int = 1
    block: str = ""
    reads: bool = False

    def read(self) -> ParameterInfo:
        """The same of a parameter that other code than its module's reads."""
        return replace(self, kind="functional" if self.takes_modules else self.kind, reads=True)

    @property
    def is_read(self) -> bool:
        """Whether other code than its module's may read it, so that it is trained where it is."""
        return self.reads or self.kind == "functional"

    @property
    def operation(self) -> str:
        """The operations of all rows, joined: `qkv`, `proj`, `fc1`."""
        return "".join(rows.operation for rows in self.row_blocks)

    @property
    def takes_modules(self) -> bool:
        """Whether a LoRA or an Adapter may be put on it."""
        return self.kind in ("linear", "pointwise")

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` reads it back."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "rows": [[rows.operation, rows.start, rows.stop] for rows in self.row_blocks],
            "groups": self.groups,
            "block": self.block,
            **({"reads": True} if self.reads else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ParameterInfo:
        """Read what `to_json` wrote; ValueError when it is not that."""
        try:
            check(value, _JSON)
            if value["kind"] not in get_args(Kind):
                raise ValueError(f"kind {value['kind']!r}")
            rows = tuple(RowBlock(*each) for each in value["rows"])
            shape = tuple(value["shape"])
            n_rows = shape[0] if shape else 1
            if not all(own.start <= own.stop <= n_rows for own in rows):
                raise ValueError(f"rows beyond the {n_rows} that there are")
            reads = value.get("reads", False)
            return cls(value["kind"], shape, rows, value["groups"], value["block"], reads)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the description of a parameter: {value!r} ({error})") from error


def _is_row_block(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and TEXT.holds(value[0])
        and COUNTS.holds(value[1:])
    )


_ROWS = JsonKind(
    "a list of rows, each a list of the operation, its start and its stop",
    lambda value: isinstance(value, list) and all(map(_is_row_block, value)),
)
_JSON: Kinds = {
    **{"kind": TEXT, "shape": COUNTS, "rows": _ROWS},
    **{"groups": SIZE, "block": TEXT, "reads": FLAG},
}


def describe(model: nn.Module) -> dict[str, ParameterInfo]:
    """Describe every named parameter of a model, in order; a shared one under its first name."""
    owners = {
        id(parameter): (module, local)
        for module in reversed(list(model.modules()))
        for local, parameter in module._parameters.items()
        if parameter is not None
    }
    fused = {id(p) for module in fused_parts(model) for p in module._parameters.values()}
    result = {}
    for name, parameter in model.named_parameters():
        module, local = owners[id(parameter)]
        shape = logical_shape(parameter)
        if is_quantized(parameter):
            is_matrix = local == "weight" and matrix_of(module) is not None
            kind: Kind = "linear" if is_matrix else "other"
        else:
            kind = _kind(module, local, parameter.ndim, parameter.is_floating_point())
        if kind == "linear" and id(parameter) in fused:
            kind = "functional"
        groups = module.groups if kind == "conv2d" and isinstance(module, nn.Conv2d) else 1
        rows = _row_blocks(name, shape, isinstance(module, nn.Linear))
        result[name] = ParameterInfo(kind, shape, rows, groups, _block(name))
    return result


def fused_parts(model: nn.Module) -> set[nn.Module]:
    """The layers and norms that torch's encoder layers hand to one fused call in eval mode.

    That reads their parameters and calls none of them, unless it sees that one needs a gradient.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    found = (m._modules.get(name) for m in layers for name in _FUSED_PARTS)
    return {part for part in found if part is not None}


def blocks_among(info: Mapping[str, ParameterInfo]) -> tuple[str, ...]:
    """Names of the blocks that parameters belong to, each once; a stage around others is none."""
    names = dict.fromkeys(what.block for what in info.values() if what.block)
    return tuple(n for n in names if not any(other.startswith(f"{n}.") for other in names))


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a Conv2d that multiplies the channels of each position by a matrix."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "same", "valid")
    )


def guess(name: str, shape: Sequence[int]) -> ParameterInfo:
    """Describe a parameter of which only the name and shape are known.

    Two dimensions make a Linear and four a Conv2d (depthwise when it has one input channel,
    pointwise when its kernel is 1×1 and it has more); a vector is a norm's when its module is
    called one, else a bias.
    """
    shape = tuple(shape)
    module_name = name.rpartition(".")[0]
    kind: Kind = "other"
    if name.endswith(("_table", "_embed", "_embedding", "_token", "_tokens")):
        pass
    elif len(shape) == 2:
        kind = "linear"
    elif len(shape) == 4:
        kind = "pointwise" if shape[2:] == (1, 1) and shape[1] > 1 else "conv2d"
    elif len(shape) == 1:
        kind = "norm" if _NORM_NAME.search(module_name) else "bias"
    groups = shape[0] if kind == "conv2d" and shape[1] == 1 else 1
    fused = kind in ("linear", "bias")
    return ParameterInfo(kind, shape, _row_blocks(name, shape, fused), groups, _block(name))


def _kind(module: nn.Module, local: str, ndim: int, is_floating: bool) -> Kind:
    if local not in ("weight", "bias") or not is_floating:
        return "other"
    if isinstance(module, nn.Linear):
        if local == "bias":
            return "bias"
        # nor does torch's attention call its output projection; while a quantized model is measured
        # its weights are stood in for
        kind = getattr(type(module), "_plain_class", None) or type(module)  # of a tuned one
        return "linear" if is_class_of_linears(kind) or is_of_a_quantizer(kind) else "functional"
    if f"{type(module).__module__}.{type(module).__name__}" == _TRANSPOSED:
        return "bias" if local == "bias" else "functional"
    if isinstance(module, nn.Conv2d):
        if local == "bias":
            return "bias"
        return "pointwise" if runs_as_conv2d(module) and is_pointwise(module) else "conv2d"
    # timm and others write their own norms: what they share is the word, and one number per channel
    is_norm = isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()
    return "norm" if is_norm and (ndim == 1 or isinstance(module, nn.LayerNorm)) else "other"


def _row_blocks(name: str, shape: tuple[int, ...], fused: bool) -> tuple[RowBlock, ...]:
    rows = shape[0] if shape else 1
    module_name, _, local = name.rpartition(".")
    parts = module_name.split(".") if local in ("weight", "bias") and module_name else [local]
    operation = parts[-1]
    if operation.isdigit() and len(parts) > 1:  # a member of a Sequential has no name of its own
        operation = f"{parts[-2]}.{operation}"
    members = _FUSED.get(operation.removeprefix("to_"), ()) if fused else ()
    if members and rows % len(members) == 0:
        size = rows // len(members)
        return tuple(RowBlock(m, i * size, (i + 1) * size) for i, m in enumerate(members))
    return (RowBlock(_SEPARATE.get(operation, operation), 0, rows),)


def _block(name: str) -> str:
    parts = name.split(".")
    for stop in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:stop])
        if _BLOCK.search(prefix):
            return prefix
    return ""
