"""What is timed to tune a LoRA's kernels is what they are launched with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench.tune_low_rank import CASES, Blocks, Case, candidates, main, prepared, shipped


def run(case: Case, blocks: Blocks) -> torch.Tensor:
    kernel, programs, arguments = prepared(case, blocks, torch.device("cpu"), tokens=100)
    kernel[(programs,)](*arguments)
    output: torch.Tensor = arguments[0].float()
    return output.sum(0) if case.kind == "grad" else output


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_of_any_size_give_the_same(case: Case) -> None:
    case = replace(case, width=case.width // 16)
    own = shipped(case)
    assert own in candidates(case.kind)
    expected = run(case, own)
    assert expected.isfinite().all()
    assert expected.count_nonzero() > expected.numel() / 2
    found = run(case, replace(own, tokens=64, features=256))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_without_a_card_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tune_low_rank"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main()
    assert capsys.readouterr().out == "no CUDA device\n"
