"""Top-τ and the allocation beside full sorts and one plain pass, and on scores made to mislead."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spt_kernels as spt
from spt_kernels import native, ops
from spt_kernels.finetuning.demo import one_thread
from tests.plan.score_reads import ScoreReads

from .contest import hold

TAU = 400_000
VIT_BLOCK = {
    "norm1.weight": (768,), "norm1.bias": (768,), "attn.qkv.weight": (2304, 768),
    "attn.qkv.bias": (2304,), "attn.proj.weight": (768, 768), "attn.proj.bias": (768,),
    "norm2.weight": (768,), "norm2.bias": (768,), "mlp.fc1.weight": (3072, 768),
    "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,),
}  # fmt: skip


@pytest.fixture(scope="module")
def vit_scores(device: torch.device) -> dict[str, Tensor]:
    """Squared gradients spread over orders of magnitude, which differ from matrix to matrix."""
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for block in range(12):
        for part, shape in VIT_BLOCK.items():
            scale = torch.rand(1, generator=generator)
            score = torch.randn(shape, generator=generator).mul_(scale).square_()
            scores[f"blocks.{block}.{part}"] = score.to(device)
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_top_tau_85m(
    benchmark: Any, device: torch.device, vit_scores: dict[str, Tensor], dtype: torch.dtype
) -> None:
    scores = [score.to(dtype) for score in vit_scores.values()]
    flat = torch.cat([score.flatten() for score in scores])
    contestants: dict[str, Callable[[], object]] = {
        "spt.ops.top_tau": lambda: ops.top_tau(scores, TAU),
        "torch.max, one pass (not a selection)": flat.max,
    }
    targets = {}
    if dtype == torch.float32:
        contestants["torch.topk of the concatenation"] = lambda: flat.topk(TAU)
        if device.type == "cuda":
            contestants["torch.cat, then torch.topk unsorted"] = lambda: torch.cat(
                [score.flatten() for score in scores]
            ).topk(TAU, sorted=False)
            targets["torch.cat, then torch.topk unsorted"] = 0.3
        else:
            targets["torch.max, one pass (not a selection)"] = 2.0
            targets["torch.topk of the concatenation"] = 1 / 15
            on_host = flat.numpy()
            contestants["numpy.argpartition of the concatenation"] = lambda: np.argpartition(
                on_host, -TAU
            )[-TAU:]
    hold(
        benchmark,
        f"top-τ: {flat.numel() / 1e6:.0f}M {str(dtype)[6:]} in {len(scores)} tensors, τ = {TAU}",
        contestants,
        rounds=5,
        bytes_moved=flat.nbytes + 8 * TAU,
        targets=targets,
        facts=passes(scores, TAU),
    )


@pytest.mark.parametrize("n_budgets", [1, 20])
def test_allocate(
    benchmark: Any, device: torch.device, vit_scores: dict[str, Tensor], n_budgets: int
) -> None:
    sensitivity = spt.Sensitivity.from_tensors(vit_scores, 800)
    budgets = [TAU * (i + 1) // n_budgets for i in range(n_budgets)]
    flat = torch.cat([score.flatten() for score in vit_scores.values()])
    reads = ScoreReads(sensitivity.values())
    if device.type == "cpu" and native.available():
        with reads:
            spt.allocate_each(sensitivity, budgets)
    hold(
        benchmark,
        f"allocate: ViT-B/16, LoRA of rank 8, {n_budgets} budget(s) up to {TAU}",
        {
            "spt.allocate_each": lambda: spt.allocate_each(sensitivity, budgets),
            "torch.max, one pass (no allocation)": flat.max,
        },
        rounds=5,
        bytes_moved=flat.nbytes,
        facts={"passes": reads.passes} if reads.bytes_read else {},
    )


@one_thread()
def test_host_of_a_selection_on_a_card(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds the launches, with tensors of a CPU, whose addresses take as long to read."""
    kernels = pytest.importorskip("spt_kernels.kernels.top_tau", reason="Triton is not installed")
    pieces = importlib.import_module("spt_kernels.kernels.top_tau_pieces")
    n = 12 * len(VIT_BLOCK)
    scores = [torch.ones(8) for _ in range(n)]
    # as if of each tensor one score were selected
    found = torch.tensor([1, 0, n, 0, 0, 0, 0, 0, *[1] * n, *[0] * n])
    monkeypatch.setattr(kernels, "_empty_state", lambda *_: found)
    monkeypatch.setattr(pieces, "load", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(pieces, "_loaded", {})
    monkeypatch.setattr(importlib.import_module("spt_kernels.ops.top_tau"), "_cpu", kernels.top_tau)
    assert [p.numel() for p in ops.top_tau(scores, n)] == [1] * n

    def of_new_tensors() -> None:
        pieces._laid_out.cache_clear()
        ops.top_tau(scores, n)

    positions = torch.zeros(n, dtype=torch.int64)
    hold(
        benchmark,
        f"host of a selection on a card, without its launches: {n} tensors, one thread",
        {
            "spt.ops.top_tau": lambda: ops.top_tau(scores, n),
            "the same of new tensors": of_new_tensors,
            "torch.split into as many (not a selection)": lambda: positions.split(1),
        },
        rounds=51,
    )


def adversaries(numel: int) -> dict[str, Callable[[], tuple[list[Tensor], int]]]:
    """By name, what makes scores in tensors, and a k: shapes and values that are not benign."""
    generator = torch.Generator().manual_seed(1)
    k = numel // 200

    def rand() -> Tensor:
        return torch.rand(numel, generator=generator)

    def normal() -> Tensor:
        return torch.randn(numel, generator=generator).square_()

    def cut(scores: Tensor, n: int = 150) -> list[Tensor]:
        return list(scores.tensor_split(n))

    def scaled() -> list[Tensor]:
        return [score * 10.0 ** (m % 30 - 15) for m, score in enumerate(cut(normal()))]

    return {
        "random": lambda: (cut(normal()), k),
        "all equal": lambda: (cut(torch.full((numel,), 3.0)), k),
        "ascending": lambda: (cut(normal().sort().values), k),
        "descending": lambda: (cut(normal().sort(descending=True).values), k),
        "one huge tensor": lambda: ([normal()], k),
        "10,000 tiny tensors": lambda: (cut(normal(), 10_000), k),
        "denormals": lambda: (
            cut((rand() * 2**22).int().add_(1).view(torch.float32)), k
        ),
        "two values": lambda: (cut((rand() < 0.3).float() + 1), k),
        "ties at the threshold": lambda: (
            cut(torch.where(rand() < 0.004, 2 + rand(), torch.tensor(1.0))), k
        ),
        "a scale per tensor": lambda: (scaled(), k),
        "log-uniform over 60 decades": lambda: (cut(10 ** (60 * rand() - 30)), k),
        "powers of two": lambda: (cut(torch.exp2((120 * rand() - 60).floor())), k),
        "k = 1": lambda: (cut(normal()), 1),
        "k = half of all": lambda: (cut(normal() + 1e-30), numel // 2),
        "k = all": lambda: (cut(normal() + 1e-30), numel),
    }  # fmt: skip


@pytest.mark.parametrize("name", adversaries(0))
def test_adversary(benchmark: Any, device: torch.device, name: str) -> None:
    numel = 1 << 24
    scores, k = adversaries(numel)[name]()
    scores = [score.to(device) for score in scores]
    random = [score.to(device) for score in adversaries(numel)["random"]()[0]]
    # the positions of half of the scores are as many bytes as the scores; and a tensor costs some
    # microseconds of Python and dispatcher, whatever it holds
    is_comparable = k <= numel // 200 and len(scores) <= 150
    hold(
        benchmark,
        f"top-τ: {name}, {numel / 1e6:.0f}M fp32 in {len(scores)} tensors, k = {k}",
        {
            "spt.ops.top_tau": lambda: ops.top_tau(scores, k),
            "the same of random scores, τ = 0.5 %": lambda: ops.top_tau(random, numel // 200),
        },
        bytes_moved=4 * numel + 8 * k,
        targets={"the same of random scores, τ = 0.5 %": 3.0} if is_comparable else {},
        facts=passes(scores, k),
    )


@pytest.mark.parametrize("tau", [1_000, 10_000, 100_000, 1_000_000, 4_000_000])
def test_growth_with_tau(benchmark: Any, vit_scores: dict[str, Tensor], tau: int) -> None:
    _hold_alone(benchmark, list(vit_scores.values()), tau, ("τ", tau))


@pytest.mark.parametrize("n_tensors", [1, 150, 10_000])
def test_growth_with_tensors(benchmark: Any, vit_scores: dict[str, Tensor], n_tensors: int) -> None:
    flat = torch.cat([score.flatten() for score in vit_scores.values()])
    scores = list(flat.tensor_split(n_tensors))
    _hold_alone(benchmark, scores, TAU, ("tensors", n_tensors))


def _hold_alone(benchmark: Any, scores: list[Tensor], tau: int, growth: tuple[str, float]) -> None:
    hold(
        benchmark,
        f"top-τ: 85M fp32 in {len(scores)} tensors, τ = {tau}, growth",
        {"spt.ops.top_tau": lambda: ops.top_tau(scores, tau)},
        rounds=5,
        bytes_moved=sum(score.nbytes for score in scores) + 8 * tau,
        growth=growth,
    )


def passes(scores: list[Tensor], k: int) -> dict[str, float | str]:
    """How often the scores were read, where that is counted."""
    if not scores[0].is_cpu or not native.available():
        return {}
    flat = [score.reshape(-1) for score in scores]
    n_bytes = native.top_tau_bytes_read(flat, k, [score.numel() for score in flat])
    return {"passes": n_bytes / sum(score.nbytes for score in scores)}
