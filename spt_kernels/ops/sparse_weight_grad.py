"""The op that computes selected entries of a linear layer's weight gradient (SDDMM)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import native
from ..reference import sparse_weight_grad as reference
from .dtypes import FLOATS
from .launching import on_card, register

if TYPE_CHECKING:
    from ..gradient_ways.tile_plan import TilePlan


# Costs on a CPU, in multiplications of the dense product, fitted beside MKL. An entry's at one
# token, which grows with what is kept in the cache: at no width, for each column, and at most. With
# AVX-512 the dense product is twice as fast, and what an entry loads from the cache is not.
_ENTRY_COSTS = {
    "portable": (1.2, 1 / 350, 5.0),  # not fitted: as AVX2's
    "avx2": (1.2, 1 / 350, 5.0),  # AMD Zen 3, two threads
    "avx512": (1.1, 1 / 128, 4.6),  # Intel Sapphire Rapids, one thread
}
# Planning an entry, sorting it by column; packing an element; a cell of a tile at one token; a
# dense product from Python: fitted on Zen 3, and near enough on Sapphire Rapids
_PLAN_COST, _SORT_COST, _PACK_COST, _CELL_COST, _CALL_COST = 200.0, 200.0, 40.0, 1.3, 2.5e6
# below this density no entry costs more than the cells of the dense product that it replaces
_DENSE_ABOVE = 0.1
# of the dense product at most so many cells are in memory at a time (5 MiB) ...
_BLOCK_NUMEL = 5 * 2**18
# ... and of operands that are cast for it so many tokens
_CAST_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """Which entries of a weight gradient are wanted, checked and prepared once for a layer.

    Built on the device where it will be used. On CUDA it holds the plan of the tiled kernel too, at
    six bytes per entry, and building it waits for the device. On a CPU one that is dense enough for
    blocks of the dense product holds where its rows begin. On `meta` every row and column occurs.

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
    # of which version of `index`, and the plan; no field, as torch 2.9 compiles none without `init`
    _native: ClassVar[tuple[int, native.WeightGradPlan | None]] = (-1, None)

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
        if index.is_meta:  # without values to look at: they may be anywhere
            rows, columns = (torch.arange(n, device="meta") for n in (out_features, in_features))
            return cls(index.int(), out_features, in_features, rows.int(), columns.int())
        ascending = bool((index[1:] > index[:-1]).all())
        if len(index) and not (ascending and index[0] >= 0 and index[-1] < numel):
            raise ValueError(
                f"index: expected ascending positions without repetition in [0, {numel}), got "
                "others"
            )
        columns = _occurring(index % in_features, in_features)
        return cls._prepare(index.int().contiguous(), out_features, in_features, columns)

    def compacted(self) -> SparsePattern:
        """The same entries for an input of which only the columns `self.columns` were kept.

        Raises:
            ValueError: positions were written into `index` since, of other columns.
        """
        if self.in_features == len(self.columns):
            return self
        column = self.index % self.in_features
        place = torch.searchsorted(self.columns, column, out_int32=True)
        if not torch.equal(self.columns[place.clamp_(max=len(self.columns) - 1)], column):
            raise ValueError(
                "index: expected the columns of when the pattern was built, got others"
            )
        index = self.index // self.in_features * len(self.columns) + place
        return self._prepare(index, self.out_features, len(self.columns), self.columns)

    def native_plan(self) -> native.WeightGradPlan | None:
        """What the C++ made of the entries: once, and anew when `index` was written into.

        None where there is no C++, and for a pattern that is dense enough for blocks of the dense
        product, whose plan that is.
        """
        index = self.index
        version = -1 if index.is_inference() else index._version  # of those nothing tells of writes
        if version != self._native[0] or version == -1:
            plan = None
            if native.available() and not self._plan:
                plan = native.WeightGradPlan(index, self.out_features, self.in_features)
            object.__setattr__(self, "_native", (version, plan))
        return self._native[1]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: plans are made again where they are needed."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @functools.cached_property
    def _tile_plan(self) -> TilePlan | None:
        """The plan as one object, which remembers what was chosen by it."""
        from ..gradient_ways.tile_plan import TilePlan

        return TilePlan(self._block, *self._plan) if self._plan else None

    @classmethod
    def _prepare(
        cls, index: Tensor, out_features: int, in_features: int, columns: Tensor
    ) -> SparsePattern:
        rows = _occurring(index // max(1, in_features), out_features)
        if index.device.type == "cpu" and len(index) > _DENSE_ABOVE * out_features * in_features:
            begin = _row_begin(index, out_features, in_features)
            n_cells = len(rows) * len(_occurring(index % in_features, in_features))
            return cls(index, out_features, in_features, rows, columns, (begin,), n_cells)
        if index.device.type != "cuda" or len(index) == 0:
            return cls(index, out_features, in_features, rows, columns)
        from .. import kernels  # noqa: F401 -- without Triton refuses here, not in the backward
        from ..gradient_ways.tile_plan import plan_tiles

        plan = plan_tiles(index, out_features, in_features)
        tensors = (plan.tiles, plan.order, plan.places, plan.rows, plan.columns)
        return cls(index, out_features, in_features, rows, columns, tensors, plan.block)


def _occurring(numbers: Tensor, limit: int) -> Tensor:
    """Which of 0..limit-1 occur, int32, sorted; without the sort that `unique` takes."""
    occurs = torch.zeros(limit, dtype=torch.bool, device=numbers.device)
    return occurs.index_fill_(0, numbers.long(), True).nonzero().flatten().int()


def sparse_weight_grad(grad_output: Tensor, input: Tensor, index: Tensor | SparsePattern) -> Tensor:
    """`g[k] = Σ_t grad_output[t, row_k] · input[t, column_k]`, without the dense gradient.

    Products are summed in fp32 and in an order that shapes alone decide: the same bits every run.
    Where a CPU takes the dense product its library decides, by the number of threads too.

    Args:
        grad_output: `[..., out]`, fp32, bf16 or fp16.
        input: `[..., in]`, with the leading dimensions and the dtype of `grad_output`.
        index: `[nnz]` int32 flat positions in `[out, in]`, or the pattern made from them once. A
            pattern is checked and lets CUDA choose the tiled kernel; a position of a bare index
            that lies outside of the weight is an error on a CPU and gives NaN on CUDA.

    Returns:
        `[nnz]` fp32.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape or device does not fit.
    """
    if grad_output.dtype not in FLOATS:
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
        _require_width("grad_output", grad_output, index.out_features)
        _require_width("input", input, index.in_features)
        positions, plan, block = index.index, index._plan, index._block
    else:
        positions = _checked(index, grad_output, input)
    if not grad_output.device == input.device == positions.device:
        raise ValueError(
            "grad_output, input, index: expected one device, got "
            f"{grad_output.device}, {input.device}, {positions.device}"
        )
    flat_grad = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, out], mostly a view
    flat_input = input.reshape(-1, input.shape[-1])  # [tokens, in]
    return torch.ops.spt.sparse_weight_grad(flat_grad, flat_input, positions, plan, block)


def launch(grad_output: Tensor, input: Tensor, pattern: SparsePattern) -> Tensor:
    """`sparse_weight_grad` of matrices of one dtype and device, a CPU's or a card's."""
    tokens, width = input.shape
    if width != pattern.in_features or tokens != grad_output.shape[0]:
        return sparse_weight_grad(grad_output, input, pattern)  # which says what does not fit
    index = pattern.index
    if not input.is_cpu:
        return _launch_on_card(grad_output, input, index, pattern._tile_plan)
    # one that is dense enough for another way than the first has none
    plan = pattern.native_plan()
    if plan is None or not (grad_output.stride(1) == input.stride(1) == 1 and tokens):
        return _cpu(grad_output, input, index, pattern._plan, pattern._block)
    return plan.run(grad_output, input, tokens, (grad_output.stride(0), input.stride(0)))


def _checked(index: Tensor, grad_output: Tensor, input: Tensor) -> Tensor:
    """An index of int32 positions in `[out, in]`, as far as looking at it may tell."""
    if index.dtype != torch.int32:
        raise TypeError(f"index: expected torch.int32, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index: expected shape [nnz], got {tuple(index.shape)}")
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


def _require_width(name: str, tensor: Tensor, width: int) -> None:
    if tensor.shape[-1] != width:
        raise ValueError(
            f"{name}: expected {width} features, as the pattern has, got {tensor.shape[-1]}"
        )


torch.library.define(
    "spt::sparse_weight_grad",
    "(Tensor grad_output, Tensor input, Tensor index, Tensor[] plan, int block) -> Tensor",
)


def _cpu(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: Sequence[Tensor], block: int
) -> Tensor:
    if not native.available():
        return reference.sparse_weight_grad(grad_output, input, index)
    grad_output, input, index = _whole_rows(grad_output), _whole_rows(input), index.contiguous()
    n_out, n_in = grad_output.shape[1], input.shape[1]
    n_cells = block or n_out * n_in  # in the rows and columns that occur, as far as is known
    if _dense_is_cheaper(len(index), n_cells, len(input), n_out, n_in):
        if plan:
            return _sampled_product(grad_output, input, index, plan[0])
        if (index[1:] > index[:-1]).all():  # a bare index may repeat positions, or have any order
            begin = _row_begin(index, n_out, n_in)
            return _sampled_product(grad_output, input, index, begin)
    return native.sparse_weight_grad(grad_output, input, index)


def _dense_is_cheaper(nnz: int, n_cells: int, tokens: int, n_out: int, n_in: int) -> bool:
    """The cost model of a CPU: dot products and tiles, or the dense product in blocks."""
    if nnz <= _DENSE_ABOVE * n_out * n_in:
        return False
    narrowest, per_width, most = _ENTRY_COSTS[native.instruction_set()]
    entry = min(narrowest + per_width * min(n_out, n_in), most)
    per_token = min(entry * nnz, _CELL_COST * n_cells) + _PACK_COST * (n_out + n_in)
    planning = (_PLAN_COST + (_SORT_COST if n_out < n_in else 0.0)) * nnz
    return per_token * tokens + planning > tokens * n_out * n_in + _CALL_COST


def _sampled_product(
    grad_output: Tensor, input: Tensor, index: Tensor, row_begin: Tensor
) -> Tensor:
    """The dense product, block by block, of which each is sampled while it is in the cache."""
    n_out, n_in = grad_output.shape[1], input.shape[1]
    grad = grad_output.new_empty(len(index), dtype=torch.float32)  # [nnz]
    if len(index) == n_out * n_in:  # every entry: the product is the result
        _product(grad_output, input, grad.view(n_out, n_in))
        return grad
    next_of_row = row_begin[:-1].clone()
    n_blocks = -(-n_out * n_in // _BLOCK_NUMEL)
    if n_blocks == 1:
        block = grad.new_empty(n_out, n_in)
        _product(grad_output, input, block)
        native.sample_block(block, (0, 0), index, row_begin, next_of_row, grad, n_in)
        return grad
    # along the wider side, so that neither operand is gone through more often than it must be
    high = n_out if n_out < n_in else -(-n_out // n_blocks)
    wide = -(-n_in // n_blocks) if n_out < n_in else n_in
    cells = grad.new_empty(high * wide)
    for row in range(0, n_out, high):
        for column in range(0, n_in, wide):
            some_grad = grad_output[:, row : row + high]
            some_input = input[:, column : column + wide]
            shape = some_grad.shape[1], some_input.shape[1]
            block = cells[: shape[0] * shape[1]].view(shape)
            _product(some_grad, some_input, block)
            native.sample_block(block, (row, column), index, row_begin, next_of_row, grad, n_in)
    return grad


def _product(grad_output: Tensor, input: Tensor, out: Tensor) -> None:
    """`grad_outputᵀ · input` in fp32; of 16-bit operands a few tokens at a time are cast."""
    if grad_output.dtype == torch.float32:
        torch.mm(grad_output.t(), input, out=out)
        return
    out.zero_()
    for some_grad, some_input in zip(
        grad_output.split(_CAST_TOKENS), input.split(_CAST_TOKENS), strict=True
    ):
        out.addmm_(some_grad.float().t(), some_input.float())


def _row_begin(index: Tensor, n_out: int, n_in: int) -> Tensor:
    """int32 `[n_out + 1]`: how many entries of a sorted index lie before each row."""
    first = torch.arange(n_out + 1, device=index.device) * n_in  # the last may be 2³¹
    return torch.searchsorted(index.long(), first, out_int32=True)


def _whole_rows(matrix: Tensor) -> Tensor:
    if matrix.numel() == 0:  # which `contiguous` leaves as it is, whatever the strides
        return matrix.new_empty(matrix.shape)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _cuda(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: Sequence[Tensor], block: int
) -> Tensor:
    from ..gradient_ways.tile_plan import TilePlan

    tile_plan = TilePlan(block, *plan) if plan else None
    return _launch_on_card(grad_output, input, index, tile_plan)


def _launch_on_card(
    grad_output: Tensor, input: Tensor, index: Tensor, tile_plan: TilePlan | None
) -> Tensor:
    with on_card(input.device):
        return _kernels().sparse_weight_grad(  # type: ignore[no-any-return]
            grad_output, input, index, tile_plan
        )


@functools.cache
def _kernels() -> Any:
    """The kernels of a card, imported where there is one; to ask for them again costs nothing."""
    from ..kernels import sparse_weight_grad

    return sparse_weight_grad


register("spt::sparse_weight_grad", "cpu", _cpu)
register("spt::sparse_weight_grad", "cuda", _cuda)


@torch.library.register_fake("spt::sparse_weight_grad")
def _fake(
    grad_output: Tensor, input: Tensor, index: Tensor, plan: list[Tensor], block: int
) -> Tensor:
    return torch.empty(index.shape, dtype=torch.float32, device=input.device)
