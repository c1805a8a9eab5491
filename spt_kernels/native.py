"""The single door to the C++ module: dtype, layout and lifetime of tensors are settled here.

Every function runs with the GIL released on `torch.get_num_threads()` threads and gives the same
bits for any number of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

_native: ModuleType | None = None
_import_error: ImportError | None = None
try:
    _native = importlib.import_module("spt_kernels._native")
except ImportError as error:  # installed without a compiler, which is allowed
    _import_error = error

# the numbers of DType in csrc/dtype.h
_DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# in the order of InstructionSet in csrc/instruction_set.h
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


def available() -> bool:
    """Whether the C++ module was built with this installation."""
    return _native is not None


def why_unavailable() -> str:
    """One sentence on what is missing, or the empty string."""
    if _native is not None:
        return ""
    return (
        f"the C++ module is not there ({_import_error}): reinstall spt_kernels with a C++17 "
        "compiler and without SPT_KERNELS_NO_NATIVE"
    )


def instruction_set() -> str:
    """Which code path runs on this processor: one of `INSTRUCTION_SETS`."""
    return INSTRUCTION_SETS[_module().instruction_set()]


def limit_instruction_set(limit: str) -> None:
    """Use no better code path than `limit` in this process: for tests and benches."""
    _module().limit_instruction_set(INSTRUCTION_SETS.index(limit))


def top_tau(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> list[Tensor]:
    """See `spt_kernels.ops.top_tau.top_tau`; tensors are contiguous, fp32 or bf16.

    Raises:
        ValueError: a score is NaN, infinite or negative, or the positive ones do not reach `k`.
    """
    return _select(tensors, k, caps)[0]


def top_tau_bytes_read(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> int:
    """How many bytes of the scores `top_tau` reads: for tests and benches, which count passes."""
    return _select(tensors, k, caps)[1]


def _select(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> tuple[list[Tensor], int]:
    if len(caps) != len(tensors):
        raise ValueError(f"caps has {len(caps)} items, expected {len(tensors)}, one per tensor")
    for m, tensor in enumerate(tensors):
        _check(f"tensors[{m}]", tensor, (torch.float32, torch.bfloat16))
    selection = _module().top_tau(
        [t.data_ptr() for t in tensors],
        [_DTYPE_NUMBERS[t.dtype] for t in tensors],
        [t.numel() for t in tensors],
        list(caps),
        k,
        torch.get_num_threads(),
    )
    positions = [torch.empty(n, dtype=torch.int64) for n in selection.counts()]  # [n] sorted
    selection.write([p.data_ptr() for p in positions])
    return positions, selection.bytes_read()


def write_delta(
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> None:
    """See `spt_kernels.ops.write_delta.write_delta`; targets are mutated.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range. Nothing
            has been written then.
    """
    for i, (target, index, original) in enumerate(zip(targets, indices, originals, strict=True)):
        _check_target(i, target, index, original, index.numel())
    for i, (index, delta) in enumerate(zip(indices, deltas or (), strict=deltas is not None)):
        _check(f"deltas[{i}]", delta, (torch.float32,), index.numel())
    _module().write_delta(
        [t.data_ptr() for t in targets],
        [_DTYPE_NUMBERS[t.dtype] for t in targets],
        [t.numel() for t in targets],
        [t.data_ptr() for t in indices],
        [t.data_ptr() for t in originals],
        [t.data_ptr() for t in deltas or ()],
        [t.numel() for t in indices],
        torch.get_num_threads(),
    )


def dropout(
    input: Tensor, output: Tensor, before: int, between: int, threshold: int, first: int
) -> None:
    """See `spt_kernels.reference.dropout.dropout`; contiguous floating tensors, may be the same.

    Raises:
        ValueError: a layout, dtype or length does not fit.
    """
    for name, tensor in (("input", input), ("output", output)):
        _check(name, tensor, (*_DTYPE_NUMBERS, torch.float64), input.numel())
    if output.dtype != input.dtype:
        raise ValueError(f"output must be {input.dtype}, got {output.dtype}")
    _module().dropout(
        input.data_ptr(),
        output.data_ptr(),
        input.numel(),
        input.element_size(),
        first,
        (before, between, threshold),
        torch.get_num_threads(),
    )


def fingerprint(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]
) -> Tensor:
    """See `spt_kernels.ops.fingerprint.fingerprint`; tensors are contiguous, of any dtype.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range.
    """
    for i, (tensor, index, original) in enumerate(zip(tensors, indices, originals, strict=True)):
        _check(f"tensors[{i}]", tensor, (tensor.dtype,))
        _check(f"indices[{i}]", index, (torch.int32,))
        _check(f"originals[{i}]", original, (tensor.dtype,), index.numel())
    found = torch.empty(len(tensors), 2, dtype=torch.int64)
    _module().fingerprint(
        [t.data_ptr() for t in tensors],
        [t.numel() for t in tensors],
        [t.element_size() for t in tensors],
        [t.data_ptr() for t in indices],
        [t.data_ptr() for t in originals],
        [t.numel() for t in indices],
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def sparse_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    hyper: Tensor,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """See `spt_kernels.ops.sparse_adamw`; params, states and targets are mutated.

    Args:
        params: fp32, contiguous, any shape.
        grads: fp32, like `params`.
        exp_avgs: fp32, like `params`.
        exp_avg_sqs: fp32, like `params`.
        targets: the weights that hold base + delta; 0 elements for a parameter without one.
        indices: int32 `[nnz]`; 0 elements without a target.
        originals: `[nnz]` in the target's dtype; 0 elements without a target.
        hyper: fp64 `[entries, 8]`: lr, beta1, beta2, eps, weight_decay, step (1 for the first, 0
            skips the entry), maximize, entry_id.
        stochastic_rounding: for bf16 and fp16 targets.
        seed: of that; its low 32 bits are used.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range. Nothing
            has been written then.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        _check(f"grads[{i}]", grad, (torch.float32,), param.numel())
    _check("hyper", hyper, (torch.float64,), 8 * len(params))
    entry_ids = [int(entry_id) for entry_id in hyper[:, 7].tolist()] if len(params) else []
    _module().sparse_adamw(
        *_adamw_entries(params, exp_avgs, exp_avg_sqs, targets, indices, originals, entry_ids),
        [t.data_ptr() for t in grads],
        hyper.data_ptr(),
        stochastic_rounding,
        seed & 0xFFFFFFFF,
        torch.get_num_threads(),
    )


class AdamWPlan:
    """The entries of `sparse_adamw` kept from step to step, so that a step hands over little.

    It holds addresses, not tensors: whoever has it compares `data_ptr()`s before each step.

    Args:
        params: see `sparse_adamw`, like all but the last two.
        exp_avgs: likewise.
        exp_avg_sqs: likewise.
        targets: likewise.
        indices: likewise.
        originals: likewise.
        entry_ids: likewise, the last column of `hyper`.
        steps: fp32 scalars, which `step` advances by 1.
        groups: for each entry, the row of `numbers` that it takes.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        targets: Sequence[Tensor],
        indices: Sequence[Tensor],
        originals: Sequence[Tensor],
        entry_ids: Sequence[int],
        *,
        steps: Sequence[Tensor],
        groups: Sequence[int],
    ) -> None:
        for i, step in enumerate(steps):
            _check(f"steps[{i}]", step, (torch.float32,), 1)
        self._plan = _module().AdamWPlan(
            *_adamw_entries(params, exp_avgs, exp_avg_sqs, targets, indices, originals, entry_ids),
            [t.data_ptr() for t in steps],
            list(groups),
        )

    def step(
        self,
        grads: Sequence[int],
        numbers: Sequence[tuple[float, ...]],
        stochastic_rounding: bool,
        seed: int,
    ) -> None:
        """Take a step.

        Args:
            grads: addresses of the gradients, fp32, contiguous, as long as their parameters.
            numbers: for each group lr, beta1, beta2, eps, weight_decay and maximize.
            stochastic_rounding: for bf16 and fp16 targets.
            seed: of that; its low 32 bits are used.

        Raises:
            ValueError: a position has come to lie out of range since the plan was made. Nothing has
                been written outside a target, but some entries may be a step ahead of others.
        """
        threads = torch.get_num_threads()
        self._plan.step(grads, numbers, stochastic_rounding, seed & 0xFFFFFFFF, threads)


def _adamw_entries(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    entry_ids: Sequence[int],
) -> tuple[list[list[int]], list[int], list[int], list[int], list[int]]:
    columns = [params, exp_avgs, exp_avg_sqs, targets, indices, originals]
    for i, row in enumerate(zip(*columns, strict=True)):
        n = row[0].numel()
        for name, tensor in zip(("params", "exp_avgs", "exp_avg_sqs"), row, strict=False):
            _check(f"{name}[{i}]", tensor, (torch.float32,), n)
        if row[3].numel() > 0:
            _check_target(i, row[3], row[4], row[5], n)
    return (
        [[t.data_ptr() for t in column] for column in columns],
        [t.numel() for t in params],
        [_DTYPE_NUMBERS.get(t.dtype, 0) for t in targets],
        [t.numel() for t in targets],
        [entry_id & 0xFFFFFFFF for entry_id in entry_ids],
    )


def sparse_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    index: Tensor,
    *,
    columns: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    """See `spt_kernels.ops.sparse_weight_grad.sparse_weight_grad`.

    Args:
        grad_output: `[tokens, out_features]`, fp32, bf16 or fp16; rows may be any distance apart.
        input: `[tokens, in_features]`, likewise, or just the named columns of it.
        index: int32 `[nnz]`, flat positions in `[out_features, in_features]`.
        columns: int32 `[n_columns]`, which columns `input` holds; needs `in_features`.
        in_features: the full number of columns.

    Returns:
        fp32 `[nnz]`, summed in fp32.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range.
    """
    _check_matrix("grad_output", grad_output)
    _check_matrix("input", input)
    if len(input) != len(grad_output):
        raise ValueError(f"input must have {len(grad_output)} tokens, got {len(input)}")
    _check("index", index, (torch.int32,))
    if columns is not None:
        _check("columns", columns, (torch.int32,), input.shape[1])
    if columns is not None and in_features is None:
        raise ValueError("in_features must be given with columns")
    in_features = input.shape[1] if columns is None or in_features is None else in_features
    grad = torch.empty(index.numel(), dtype=torch.float32)  # [nnz]
    _module().sparse_weight_grad(
        (len(grad_output), grad_output.shape[1], in_features),
        *(
            (t.data_ptr(), _DTYPE_NUMBERS[t.dtype], t.stride(0), t.shape[1])
            for t in (grad_output, input)
        ),
        0 if columns is None else columns.data_ptr(),
        index.data_ptr(),
        index.numel(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    return grad


def sample_block(
    cells: Tensor,
    corner: tuple[int, int],
    index: Tensor,
    row_begin: Tensor,
    next_of_row: Tensor,
    grad: Tensor,
    in_features: int,
) -> None:
    """Take the entries that lie in one block of a dense weight gradient.

    Args:
        cells: fp32 `[rows, columns]`, the block.
        corner: its first row and column in the whole gradient.
        index: int32 `[nnz]`, ascending flat positions in `[out_features, in_features]`.
        row_begin: int32 `[out_features + 1]`, the number of entries before each row.
        next_of_row: int32 `[out_features]`, each row's first entry that was not taken yet: a copy
            of `row_begin[:-1]` at first. Moved on, so blocks must come from left to right.
        grad: fp32 `[nnz]`, into which the entries are written.
        in_features: columns of the whole gradient.

    Raises:
        ValueError: a layout, dtype or length does not fit, or an entry is not where it should be.
    """
    _check("cells", cells, (torch.float32,))
    _check("index", index, (torch.int32,))
    _check("row_begin", row_begin, (torch.int32,))
    _check("next_of_row", next_of_row, (torch.int32,), row_begin.numel() - 1)
    _check("grad", grad, (torch.float32,), index.numel())
    if corner[0] + cells.shape[0] > next_of_row.numel() or corner[1] + cells.shape[1] > in_features:
        raise ValueError(
            f"cells must lie in the {next_of_row.numel()}×{in_features} gradient, got shape "
            f"{tuple(cells.shape)} at {corner}"
        )
    _module().sample_block(
        cells.data_ptr(),
        corner,
        tuple(cells.shape),
        in_features,
        index.data_ptr(),
        row_begin.data_ptr(),
        next_of_row.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )


def accumulate_squared_grad(
    score: Tensor, grad_output: Tensor, input: Tensor, scale: float
) -> None:
    """See `spt_kernels.ops.squared_grad.accumulate_squared_grad`; `score` is mutated.

    Args:
        score: fp32 `[out_features, in_features]`; rows may be any distance apart.
        grad_output: `[samples, tokens, out_features]`, fp32, bf16 or fp16; any strides.
        input: `[samples, tokens, in_features]`, likewise.
        scale: factor on each sample's gradient before it is squared.

    Raises:
        ValueError: a layout, dtype or length does not fit.
    """
    _check_matrix("score", score, (torch.float32,))
    _check_samples("grad_output", grad_output, score.shape[0])
    _check_samples("input", input, score.shape[1])
    if input.shape[:2] != grad_output.shape[:2]:
        raise ValueError(
            f"input must have {tuple(grad_output.shape[:2])} samples and tokens, got "
            f"{tuple(input.shape[:2])}"
        )
    _module().accumulate_squared_grad(
        score.data_ptr(),
        score.stride(0),
        (*grad_output.shape, score.shape[1]),
        *((t.data_ptr(), _DTYPE_NUMBERS[t.dtype], t.stride()) for t in (grad_output, input)),
        scale,
        torch.get_num_threads(),
    )


def _module() -> ModuleType:
    if _native is None:
        raise RuntimeError(why_unavailable())
    return _native


def _check_samples(name: str, activation: Tensor, n_features: int) -> None:
    fits = activation.dim() == 3 and activation.dtype in _DTYPE_NUMBERS and activation.is_cpu
    if fits and activation.shape[2] == n_features:
        return
    raise ValueError(
        f"{name} must be a CPU tensor of {' or '.join(map(str, _DTYPE_NUMBERS))} with shape "
        f"[samples, tokens, {n_features}], got {activation.dtype} on {activation.device} with "
        f"shape {tuple(activation.shape)}"
    )


def _check_matrix(
    name: str, matrix: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(_DTYPE_NUMBERS)
) -> None:
    fits = matrix.dim() == 2 and matrix.dtype in dtypes and matrix.is_cpu
    if fits and (matrix.stride(1) == 1 or matrix.shape[1] <= 1):
        return
    raise ValueError(
        f"{name} must be a CPU matrix of {' or '.join(map(str, dtypes))} with contiguous "
        f"rows, got {matrix.dtype} on {matrix.device} with shape {tuple(matrix.shape)} and strides "
        f"{matrix.stride()}"
    )


def _check_target(i: int, target: Tensor, index: Tensor, original: Tensor, nnz: int) -> None:
    _check(f"targets[{i}]", target, tuple(_DTYPE_NUMBERS))
    _check(f"indices[{i}]", index, (torch.int32,), nnz)
    _check(f"originals[{i}]", original, (target.dtype,), nnz)


def _check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int | None = None
) -> None:
    if tensor.dtype in dtypes and tensor.is_cpu and tensor.is_contiguous():
        if numel is None or tensor.numel() == numel:
            return
        raise ValueError(f"{name} must have {numel} elements, got {tensor.numel()}")
    raise ValueError(
        f"{name} must be a contiguous CPU tensor of {' or '.join(map(str, dtypes))}, got "
        f"{tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()}"
    )
