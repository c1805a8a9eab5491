"""A head of another number of classes comes whole or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spt_kernels.model.replaced_head import fit_head


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
