"""A head of another number of classes comes whole or not at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels.model.replaced_head import fit_head, head_problem


def test_heads_whose_memory_runs_out_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 2), "head_dist": nn.Linear(3, 2)})
    heads = list(model.values())
    enough = iter([nn.Linear(3, 4)])  # for one of the two

    def made(*_: object, **__: object) -> nn.Module:
        if (new := next(enough, None)) is None:
            raise torch.cuda.OutOfMemoryError("there is none")
        return new

    monkeypatch.setattr(nn.utils, "skip_init", made)
    values = {"head.weight": torch.ones(4, 3), "head_dist.weight": torch.ones(4, 3)}
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit_head(model, values, elsewhere=())
    assert list(model.values()) == heads


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=1), F.normalize(self.weight, dim=1))


@pytest.mark.parametrize("head", [Cosine(3, 2, bias=False), nn.Conv2d(3, 2, 1, bias=False)])
def test_a_head_that_computes_something_else_has_no_linear_put_in_its_place(
    head: nn.Module,
) -> None:
    model = nn.ModuleDict({"head": head})
    problem = head_problem(model, {"head.weight": torch.ones(4, 3)}, elsewhere=())
    assert problem is not None
    assert (
        f"expected a plain Linear to put the task's head in the place of, got {type(head).__name__}"
        in problem
    )
    own = {"head.weight": torch.ones_like(head.weight)}
    assert head_problem(model, own, elsewhere=()) is None
