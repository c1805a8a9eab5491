"""Sparse rows added to a product, against the product with the changed weights in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from spt_kernels import native
from spt_kernels.ops.add_sparse_rows import add_sparse_rows
from spt_kernels.reference import add_sparse_rows as reference

from ..tolerance import assert_within_budget

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# dtype of activations, of weights: autocast lets those be wider
DTYPES = [*[(dtype, dtype) for dtype in FLOATS], *[(d, torch.float32) for d in FLOATS[1:]]]
SPANS: dict[str, list[tuple[int, int]]] = {
    "one": [(0, 7)],
    "ragged": [(3, 70), (70, 71), (71, 200)],
    "gaps": [(1, 5), (9, 9), (40, 130)],
}


@dataclass(frozen=True)
class Case:
    """Inputs of one call, and the weights that they come from."""

    output: Tensor  # [tokens, out], the product with the weight
    input: Tensor  # [tokens, in]
    weight: Tensor  # [out, in]
    spans: list[tuple[int, int]]
    indices: list[Tensor]
    befores: list[Tensor]
    afters: list[Tensor]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of one call; the output is a copy."""
        rows = self.indices, self.befores, self.afters
        return self.output.clone(), self.input, self.spans, *rows

    def products(self, dtype: torch.dtype) -> Tensor:
        """`[tokens, out]` with the changed weight of each span."""
        rounded = self.output.dtype
        found = self.input.to(dtype) @ self.weight.to(rounded).to(dtype).t()
        rows = zip(self.spans, self.indices, self.afters, strict=True)
        for (start, stop), index, after in rows:
            weight = self.weight.to(rounded).clone()
            weight.view(-1)[index.long()] = after.to(rounded)
            found[start:stop] = self.input[start:stop].to(dtype) @ weight.to(dtype).t()
        return found


def make_case(
    spans: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    sizes: tuple[int, int] = (19, 33),
    share: float = 0.1,
) -> Case:
    generator = torch.Generator().manual_seed(len(spans))
    n_out, n_in = sizes
    tokens = max(stop for _, stop in spans) + 2
    weight = torch.randn(n_out, n_in, generator=generator).to(weight_dtype or dtype)
    input = torch.randn(tokens, n_in, generator=generator).to(dtype)
    indices, befores, afters = [], [], []
    for _ in spans:
        chosen = torch.rand(n_out * n_in, generator=generator) < share
        indices.append(chosen.nonzero().flatten().int())
        befores.append(weight.view(-1)[indices[-1].long()])
        moved = befores[-1].float() + torch.randn(len(indices[-1]), generator=generator)
        afters.append(moved.to(weight.dtype))
    output = (input.double() @ weight.to(dtype).double().t()).to(dtype)
    return Case(output, input, weight, list(spans), indices, befores, afters)


def check(case: Case, found: Tensor) -> None:
    """The error is that of a plain product in this dtype, and one more rounding."""
    truth = case.products(torch.float64)
    assert_within_budget(found, case.products(found.dtype), truth)
    inside = torch.zeros(len(found), dtype=torch.bool)
    for start, stop in case.spans:
        inside[start:stop] = True
    assert torch.equal(found[~inside], case.output[~inside])


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_is_the_product_with_each_spans_weights(
    spans: list[tuple[int, int]], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    case = make_case(spans, dtype, weight_dtype)
    arguments = case.arguments
    add_sparse_rows(*arguments)
    check(case, arguments[0])


@pytest.mark.parametrize("share", [0.001, 0.02, 1.0], ids=["few", "some", "every-entry"])
def test_of_few_and_of_all_entries(share: float) -> None:
    case = make_case(SPANS["ragged"], torch.float32, sizes=(40, 90), share=share)
    arguments = case.arguments
    add_sparse_rows(*arguments)
    check(case, arguments[0])


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
def test_native_agrees_with_the_reference(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    if not native.available():
        pytest.skip(native.why_unavailable())
    case = make_case(SPANS["gaps"], dtype, weight_dtype)
    ours, spec = case.arguments, case.arguments
    native.add_sparse_rows(*ours)
    reference.add_sparse_rows(*spec)
    # sums of other order: at most the last place differs
    torch.testing.assert_close(ours[0], spec[0], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_what_does_not_change_adds_nothing() -> None:
    case = make_case(SPANS["ragged"], torch.bfloat16, torch.float32)
    # below a half of the last place of bf16: the product with them is the same
    befores = [before.bfloat16().float() for before in case.befores]
    afters = [before * (1 + 2**-12) for before in befores]
    output = case.output.clone()
    add_sparse_rows(output, case.input, case.spans, case.indices, befores, afters)
    assert torch.equal(output, case.output)


def test_same_bits_with_one_thread() -> None:
    case = make_case(SPANS["ragged"], torch.float32, sizes=(64, 96))
    many, one = case.arguments, case.arguments
    threads = torch.get_num_threads()
    add_sparse_rows(*many)
    torch.set_num_threads(1)
    try:
        add_sparse_rows(*one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many[0], one[0])


def test_no_neighbour_of_a_span_is_read_or_written() -> None:
    case = make_case([(2, 67)], torch.float32)
    case.input[:2] = math.nan
    case.input[67:] = math.nan
    arguments = case.arguments
    add_sparse_rows(*arguments)
    assert arguments[0].isfinite().all()


def test_nothing_to_add() -> None:
    case = make_case(SPANS["one"], torch.float32)
    output = case.output.clone()
    add_sparse_rows(output, case.input, [], [], [], [])
    empty = [torch.empty(0)]
    add_sparse_rows(output, case.input, [(0, 3)], [torch.empty(0, dtype=torch.int32)], empty, empty)
    assert torch.equal(output, case.output)


def test_opcheck() -> None:
    case = make_case(SPANS["ragged"], torch.float32)
    output, input, spans, *rows = case.arguments
    starts, stops = [a for a, _ in spans], [b for _, b in spans]
    opcheck(torch.ops.spt.add_sparse_rows.default, (output, input, starts, stops, *rows))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_cuda_is_the_product_with_each_spans_weights(
    spans: list[tuple[int, int]], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    case = make_case(spans, dtype, weight_dtype, sizes=(70, 130))
    output, input, _, *rows = case.arguments
    on_card = output.cuda(), input.cuda(), spans, *([t.cuda() for t in row] for row in rows)
    add_sparse_rows(*on_card)
    check(case, on_card[0].cpu())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": torch.zeros(4, 3).double()}, TypeError, "output must be float32"),
        ({"input": torch.zeros(4, 2).half()}, TypeError, "input must be .* both of one dtype"),
        ({"input": torch.zeros(2, 4).t()}, ValueError, "input must be a contiguous matrix"),
        ({"input": torch.zeros(5, 2)}, ValueError, "input must have 4 tokens on cpu, got 5"),
        ({"spans": [(0, 5)]}, ValueError, r"within the 4 tokens, got \[\(0, 5\)\]"),
        ({"spans": [(2, 1)]}, ValueError, "spans must be apart"),
        ({"afters": []}, ValueError, "afters has 0 items, expected 1"),
        ({"indices": [torch.zeros(2, dtype=torch.int64)]}, TypeError, r"indices\[0\] must be"),
        ({"befores": [torch.zeros(2).half()]}, TypeError, r"befores\[0\] must be float32"),
        ({"afters": [torch.zeros(3)]}, ValueError, r"afters\[0\] must be contiguous, of shape"),
        ({"indices": [torch.tensor([0, 6], dtype=torch.int32)]}, ValueError, r"positions in 0..5"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    if "positions" in message and not native.available():
        pytest.skip(native.why_unavailable())
    good = {
        "output": torch.zeros(4, 3),
        "input": torch.zeros(4, 2),
        "spans": [(0, 2)],
        "indices": [torch.tensor([0, 3], dtype=torch.int32)],
        "befores": [torch.zeros(2)],
        "afters": [torch.ones(2)],
    }
    arguments = {**good, **changes}
    with pytest.raises(error, match=message):
        add_sparse_rows(**arguments)  # type: ignore[arg-type]
    assert not good["output"].any()  # type: ignore[attr-defined]
