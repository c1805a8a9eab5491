"""Methods side by side, called from Python: what `spt-kernels memory` shows."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.memory import estimate_memory, estimate_methods, largest_batch
from tests.models import tiny_convnext, tiny_vit

SHAPE = (4, 3, 16, 16)


def test_each_is_what_it_is_alone() -> None:
    model, done = tiny_vit(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers, missing = estimate_methods(
        model, SHAPE, ("linear", "spt-lora"), on_row=done.append, dtype="bf16"
    )
    assert (done, missing) == (["linear", "spt-lora"], {})
    for name, answer in answers.items():
        alone = estimate_memory(model, SHAPE, method=name, dtype="bf16")
        assert answer.estimate.peak_bytes == alone.peak_bytes
        assert answer.estimate.made_up_scores == (name == "spt-lora")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_largest_batches() -> None:
    limits = (2**19, 2**20)
    answers, _ = estimate_methods(tiny_vit(), SHAPE, ("linear",), limits_bytes=limits)
    found = [found.batch for found in answers["linear"].found.values()]
    assert found == [
        largest_batch(tiny_vit(), SHAPE[1:], limit, method="linear").batch for limit in limits
    ]
    assert found[0] < found[1]


def test_a_method_that_cannot_tune_the_model_is_told_of_and_the_others_stay() -> None:
    answers, missing = estimate_methods(tiny_convnext(), (2, 3, 32, 32), ("linear", "prompt-deep"))
    assert list(answers) == ["linear"]
    assert isinstance(missing["prompt-deep"], ValueError)
    with pytest.raises(ValueError, match="method: expected one of"):
        estimate_methods(tiny_vit(), SHAPE, ("fll",))


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"dtyp": "bf16"}, TypeError, "dtyp: unexpected, .*; did you mean dtype"),
        ({"dtype": "xx"}, ValueError, "dtype must be one of"),
    ],
)
def test_what_is_nobodys_but_the_callers_is_raised(
    how: dict[str, str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        estimate_methods(tiny_vit(), SHAPE, ("linear",), **how)
