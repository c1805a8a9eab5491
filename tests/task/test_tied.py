"""A task of weights that are tied fits a model in which they are, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.errors import BaseModelMismatch
from spt_kernels.plan import Plan
from spt_kernels.task.file.format import decode, encode, read

WORDS = torch.arange(7)


class Speaker(nn.Module):
    """What reads words and says words, by one table or by two that are equal."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.say = nn.Linear(4, 7, bias=False)
        if is_tied:
            self.say.weight = self.words.weight
        else:
            self.say.weight.data.copy_(self.words.weight.data)

    def forward(self, words: Tensor) -> Tensor:
        return self.say(self.norm(self.words(words)))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def trained(dtype: torch.dtype) -> nn.Module:
    """Its words are trained whole, and that is all."""
    model = Speaker(is_tied=True).to(dtype)
    spt.apply(model, Plan({}, {}, {}, head=("words.weight",), model_name="speaker"))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.1)
    model(WORDS).float().logsumexp(1).sum().backward()
    optimizer.step()
    return model


def test_a_tied_model_takes_it(trained: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    spt.save_delta(trained, tmp_path / "task")
    loaded = spt.load_delta(Speaker(is_tied=True).to(dtype), tmp_path / "task")
    assert torch.equal(loaded(WORDS), trained(WORDS))
    spt.load_delta(loaded, tmp_path / "task")  # likewise where it is on already
    task = read(tmp_path / "task")
    assert dict(task.tied) == {"words.weight": ("say.weight",)}
    assert decode(encode(task)).tied == task.tied


def test_one_that_is_not_is_refused(trained: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    spt.save_delta(trained, tmp_path / "task")
    model = Speaker(is_tied=False).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BaseModelMismatch, match=r"say\.weight: expected the same parameter as wor"):
        spt.load_delta(model, tmp_path / "task")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "spt_tuning")


def test_one_whose_two_lie_in_one_memory_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    """A task of either could not be dropped again, and one of two tables would be in both."""
    spt.save_delta(trained, tmp_path / "tied")
    apart = spt.apply(
        Speaker(is_tied=False).to(trained.norm.weight.dtype),  # type: ignore[arg-type]
        Plan({}, {}, {}, head=("words.weight",), model_name="speaker"),
    )
    spt.save_delta(apart, tmp_path / "apart")
    model = Speaker(is_tied=False).to(trained.norm.weight.dtype)  # type: ignore[arg-type]
    model.say.weight.data = model.words.weight.data
    for name in ("tied", "apart"):
        with pytest.raises(ValueError, match=r"words\.weight is shared with say\.weight: two"):
            spt.load_delta(model, tmp_path / name)
        assert not hasattr(model, "spt_tuning")
