"""The kernel of `add_sparse_rows`, interpreted, against products with the changed weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import add_sparse_rows as kernels

from ...ops.test_add_sparse_rows import DTYPES, SPANS, check, make_case


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TOKENS", 32)
    monkeypatch.setattr(kernels, "_ROWS", 4)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
def test_each_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = make_case(SPANS["ragged"], dtype, weight_dtype, sizes=(9, 13))
    arguments = case.arguments
    kernels.add_sparse_rows(*arguments)
    check(case, arguments[0])


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("share", [0.01, 0.2, 1.0], ids=["few", "some", "every-entry"])
def test_spans_and_densities(spans: list[tuple[int, int]], share: float) -> None:
    case = make_case(spans, torch.float32, sizes=(10, 12), share=share)
    arguments = case.arguments
    kernels.add_sparse_rows(*arguments)
    check(case, arguments[0])


def test_at_the_shipped_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = make_case([(0, 130), (131, 140)], torch.float32, sizes=(33, 8), share=0.3)
    arguments = case.arguments
    kernels.add_sparse_rows(*arguments)
    check(case, arguments[0])


def test_spans_without_entries_are_passed_over() -> None:
    case = make_case([(0, 3), (3, 6), (6, 9)], torch.float32)
    for n in (0, 2):
        for column in (case.indices, case.befores, case.afters):
            column[n] = column[n][:0]
    arguments = case.arguments
    kernels.add_sparse_rows(*arguments)
    check(case, arguments[0])
    kernels.add_sparse_rows(*arguments[:2], [(0, 3)], *([column[:1] for column in arguments[3:]]))
    check(case, arguments[0])
