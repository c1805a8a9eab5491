"""What a measurement keeps: activations that are made again, and gradients as they come alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import spt_kernels as spt
from spt_kernels.memory.ledger import Ledger
from spt_kernels.sensitivity.per_sample import remaking
from tests.models import tiny_batch, tiny_vit

from .per_sample_truth import assert_exact


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of all storages that autograd saves while `run` runs."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # an address means nothing once its storage is gone

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager]:
    """A context in which nothing is made again."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(remaking, "_CHEAP", frozenset())
            yield

    return context


def test_results_of_norms_and_gelu_are_not_kept(keeping) -> None:
    model, batch = tiny_vit(depth=3), tiny_batch(8)

    def measure() -> spt.Sensitivity:
        return spt.measure_sensitivity(model, [batch], num_samples=8)

    with keeping():
        before = saved_bytes(measure)
    # of a block's 17 widths, 2 are of norms and 4 of the GELU; weights are saved as well
    assert saved_bytes(measure) < 0.8 * before


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_the_scores_have_the_same_bits(keeping, autocast: bool) -> None:
    model, batch = tiny_vit(), tiny_batch(4)

    def measure() -> spt.Sensitivity:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return spt.measure_sensitivity(model, [batch], num_samples=4)

    with keeping():
        kept = measure()
    remade = measure()
    assert all(torch.equal(remade[name], kept[name]) for name in kept)


class Edits(nn.Module):
    """Writes into what comes from, or goes into, the functions that are computed again."""

    def __init__(self, edit: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edit = edit
        self.first = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(10)
        self.gelu, self.silu, self.silu_ = nn.GELU(), nn.SiLU(), nn.SiLU(inplace=True)
        self.second = nn.Linear(10, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.edit == "result of a norm":
            x = self.norm(x)
            x[:, ::2] *= 3
        elif self.edit == "result of a GELU":
            x = self.gelu(self.norm(x))
            x.add_(1)
        elif self.edit == "input without a graph":
            detached = x.detach().clone()
            x = self.gelu(detached) + self.norm(x)
            detached.zero_()
        elif self.edit == "other memory for a result":
            x = self.gelu(self.norm(x))
            x.data = x.data + 1
        elif self.edit == "other memory for an input":
            normed = self.norm(x)
            x = self.gelu(normed)
            normed.data = normed.data + 1
        elif self.edit == "SiLU in place":
            x = self.silu_(self.norm(x))
        elif self.edit == "result twice":
            x = self.silu(self.norm(x))
            return self.head(self.second(x) + x @ self.second.weight)
        return self.head(self.second(x).relu())


@pytest.mark.parametrize(
    "edit",
    [
        "result of a norm",
        "result of a GELU",
        "input without a graph",
        "other memory for a result",
        "other memory for an input",
        "SiLU in place",
        "result twice",
    ],
)
def test_edited_activations_are_exact(edit: str) -> None:
    model = Edits(edit).eval()
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(6, 12, generator=generator), torch.arange(6) % 5)
    assert_exact(spt.measure_sensitivity(model, [batch], num_samples=6), model, [batch])


DEPTH, WIDTH = 16, 96
PRODUCT = "bi,oi->bo"  # which is no call that is seen


class Deep(nn.Module):
    """Many matrices and tiny activations: what there is of its size, there is of its gradients."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.stem = nn.Linear(8, WIDTH)
        self.weights = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        x = self.stem(x)
        for layer in self.weights:
            x = self.apply_to(layer, x).tanh()
        x = self.head(x)
        # two terms: no share of a sample's in the loss of a batch
        return x if labels is None else {"loss": F.cross_entropy(x, labels) + (x**2).mean()}

    def apply_to(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.way == "out of sight":
            return torch.einsum(PRODUCT, x, layer.weight)
        if self.way == "derived":
            return F.linear(x, layer.weight - layer.weight.mean(1, keepdim=True))
        if self.way == "reentrant":
            return checkpoint(
                lambda x: torch.einsum(PRODUCT, x, layer.weight), x, use_reentrant=True
            )
        return layer(x)


def peak_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Most bytes alive at a time while `run` runs, besides the parameters of `model`."""
    ledger = Ledger(Tensor)
    ledger.follow((), elsewhere=model.parameters(), category="weights")
    with ledger:
        run()
    return max(ledger.curve(0))


# ways, and how often the memory of all matrices there is besides the scores
BESIDES = {
    "in sight": 0,
    "out of sight": 0,
    "alone": 0,
    "derived": 1,  # what the model makes of its parameters
    "reentrant": 1,  # such checkpoints bring gradients in parts
}


@pytest.mark.parametrize("way", BESIDES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_beside_the_scores_there_is_one_gradient_at_a_time(way: str) -> None:
    model = Deep(way)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, 8, generator=generator), torch.arange(2)
    batch = {"x": x, "labels": labels} if way == "alone" else (x, labels)
    found: list[spt.Sensitivity] = []
    peak = peak_bytes(
        model, lambda: found.append(spt.measure_sensitivity(model, [batch], num_samples=2))
    )
    [sensitivity] = found
    matrix = 4 * WIDTH**2
    assert sum(score.nbytes for score in sensitivity.values()) == DEPTH * matrix
    assert len(sensitivity.fallback) == (0 if way in ("in sight", "derived") else DEPTH)
    # activations, and of one parameter the gradients of both samples on the way to their squares
    assert peak < (1 + BESIDES[way]) * DEPTH * matrix + 8 * matrix
