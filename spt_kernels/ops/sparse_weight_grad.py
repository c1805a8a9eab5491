"""The op that computes selected entries of a linear layer's weight gradient (SDDMM)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import native
from ..reference import sparse_weight_grad as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """Which entries of a weight gradient are wanted, checked and prepared once for a layer.

    Built on the device where it will be used. On CUDA it holds the plan of the tiled kernel too, at
    six bytes per entry, and building it waits for the device.

    Attributes:
        index: `[nnz]` int32: sorted flat positions in `[out_features, in_features]`.
        out_features: width of the gradient of the output.
        in_features: width of the input that it expects: fewer than the weight has when the pattern
            is for an input of some columns only.
        rows: int32, the rows that occur, sorted.
        columns: int32, the columns of the weight that occur, sorted.
    """

    index: Tensor
    out_features: int
    in_features: int
    rows: Tensor
    columns: Tensor
    _plan: tuple[Tensor, ...] = field(default=(), repr=False)
    _block: int = field(default=0, repr=False)

    @classmethod
    def build(cls, index: Tensor, out_features: int, in_features: int) -> SparsePattern:
        """Check `index`, sorted flat positions in `[out_features, in_features]`, and prepare it.

        Raises:
            TypeError: `index` is neither int32 nor int64.
            ValueError: it is not a vector, not sorted, repeats a position or leaves the weight.
        """
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index: expected int32 or int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"index: expected shape [nnz], got {tuple(index.shape)}")
        numel = out_features * in_features
        if numel >= 2**31:
            raise ValueError(f"index: expected a weight of fewer than 2³¹ elements, got {numel}")
        if len(index) and not (index[0] >= 0 and index[-1] < numel and (index.diff() > 0).all()):
            raise ValueError(
                f"index: expected ascending positions without repetition in [0, {numel}), got "
                "others"
            )
        return cls._prepare(
            index.int(), out_features, in_features, torch.unique(index % in_features).int()
        )

    def compacted(self) -> SparsePattern:
        """The same entries for an input of which only the columns `self.columns` were kept."""
        if self.in_features == len(self.columns):
            return self
        index = _within(self.index, self.columns, self.in_features)
        return self._prepare(index, self.out_features, len(self.columns), self.columns)

    @classmethod
    def _prepare(
        cls, index: Tensor, out_features: int, in_features: int, columns: Tensor
    ) -> SparsePattern:
        # the clone lets go of a storage as long as the index, of which few elements are rows
        rows = torch.unique_consecutive(index // max(1, in_features)).clone()
        if index.device.type != "cuda" or len(index) == 0:
            return cls(index, out_features, in_features, rows, columns)
        from ..kernels.tile_plan import plan_tiles

        plan = plan_tiles(index, out_features, in_features)
        tensors = (plan.tiles, plan.order, plan.places, plan.rows, plan.columns)
        return cls(index, out_features, in_features, rows, columns, tensors, plan.block)


def sparse_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    index: Tensor | SparsePattern,
    *,
    columns: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    """`g[k] = Σ_t grad_output[t, row_k] · input[t, column_k]`, without the dense gradient.

    Products are summed in fp32 and in an order that shapes alone decide: the same bits every run.

    Args:
        grad_output: `[..., out]`, fp32, bf16 or fp16.
        input: `[..., in]`, with the leading dimensions and the dtype of `grad_output`.
        index: `[nnz]` int32 flat positions in `[out, in]`, or the pattern made from them once. A
            pattern is checked and lets CUDA choose the tiled kernel; a position of a bare index
            that lies outside of the weight is an error on a CPU and gives NaN on CUDA.
        columns: `[n]` int32, sorted: `input` holds only these columns of the layer's input, while
            `index` still refers to the whole weight. For a pattern use `pattern.compacted()`.
        in_features: columns of the whole weight; goes with `columns`.

    Returns:
        `[nnz]` fp32.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape or device does not fit, or an argument is missing.
    """
    if grad_output.dtype not in _FLOATS:
        raise TypeError(f"grad_output: expected fp32, bf16 or fp16, got {grad_output.dtype}")
    if input.dtype != grad_output.dtype:
        raise TypeError(
            f"input: expected {grad_output.dtype}, the dtype of grad_output, got {input.dtype}"
        )
    if grad_output.dim() < 1 or input.shape[:-1] != grad_output.shape[:-1] or input.dim() < 1:
        raise ValueError(
            f"input: expected the leading dimensions of grad_output, {tuple(grad_output.shape)}, "
            f"got {tuple(input.shape)}"
        )
    plan: tuple[Tensor, ...] = ()
    block = 0
    if isinstance(index, SparsePattern):
        if columns is not None or in_features is not None:
            raise ValueError("columns: a pattern knows its own, pass pattern.compacted() instead")
        _require_widths(grad_output, input, index.out_features, index.in_features)
        positions, plan, block = index.index, index._plan, index._block
    else:
        positions = _checked(index, grad_output, input, columns, in_features)
    if not grad_output.device == input.device == positions.device:
        raise ValueError(
            "grad_output, input, index: expected one device, got "
            f"{grad_output.device}, {input.device}, {positions.device}"
        )
    flat_grad = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, out], mostly a view
    flat_input = input.reshape(-1, input.shape[-1])  # [tokens, in]
    return torch.ops.spt.sparse_weight_grad(flat_grad, flat_input, positions, plan, block)


def _checked(
    index: Tensor,
    grad_output: Tensor,
    input: Tensor,
    columns: Tensor | None,
    in_features: int | None,
) -> Tensor:
    """Positions in `[out, columns of input]`."""
    if index.dtype != torch.int32:
        raise TypeError(f"index: expected torch.int32, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index: expected shape [nnz], got {tuple(index.shape)}")
    if (columns is None) != (in_features is None):
        raise ValueError("columns, in_features: expected both or neither, got one of them")
    if columns is not None and in_features is not None:
        if input.shape[-1] != len(columns):
            raise ValueError(
                f"input: expected {len(columns)} columns, as many as there are in columns, "
                f"got {input.shape[-1]}"
            )
        index = _within(index, columns, in_features)
    numel = grad_output.shape[-1] * input.shape[-1]
    # on CUDA looking would wait for the device; there the kernel never reads out of range
    if index.device.type == "cpu" and len(index):
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= numel:
            raise ValueError(
                f"index: expected positions in the {grad_output.shape[-1]}×{input.shape[-1]} "
                f"gradient, got {lowest if lowest < 0 else highest}"
            )
    return index


def _within(index: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Positions in the weight without its other columns; -1 for a position in one of those."""
    column = index % in_features
    place = torch.searchsorted(columns, column, out_int32=True).clamp_(max=len(columns) - 1)
    position = index // in_features * len(columns) + place
    return torch.where(columns[place] == column, position, -1) if len(index) else index


def _require_widths(grad_output: Tensor, input: Tensor, out_width: int, in_width: int) -> None:
    for name, tensor, width in (
        ("grad_output", grad_output, out_width),
        ("input", input, in_width),
    ):
        if tensor.shape[-1] != width:
            raise ValueError(
                f"{name}: expected {width} features, as the pattern has, got {tensor.shape[-1]}"
            )


torch.library.define(
    "spt::sparse_weight_grad",
    "(Tensor grad_output, Tensor input, Tensor index, Tensor[] plan, int block) -> Tensor",
)


@torch.library.register_kernel("spt::sparse_weight_grad", "cpu")
def _cpu(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: list[Tensor], block: int
) -> Tensor:
    if not native.available():
        return reference.sparse_weight_grad(grad_output, input, index)
    return native.sparse_weight_grad(
        _whole_rows(grad_output), _whole_rows(input), index.contiguous()
    )


def _whole_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@torch.library.register_kernel("spt::sparse_weight_grad", "cuda")
def _cuda(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: list[Tensor], block: int
) -> Tensor:
    from ..kernels import sparse_weight_grad as kernels
    from ..kernels.tile_plan import TilePlan

    tile_plan = TilePlan(block, *plan) if plan else None
    with torch.cuda.device(input.device):  # Triton launches on the current device
        return kernels.sparse_weight_grad(grad_output, input, index, tile_plan)


@torch.library.register_fake("spt::sparse_weight_grad")
def _fake(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: list[Tensor], block: int
) -> Tensor:
    return torch.empty(index.shape, dtype=torch.float32, device=input.device)
