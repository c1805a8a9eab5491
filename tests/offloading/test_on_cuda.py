"""On a card: the same bits with weights on the host, in less memory, however far ahead that is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.finetuning.device import reproducible
from spt_kernels.memory import estimate_memory
from spt_kernels.methods import METHODS
from spt_kernels.sensitivity import skewed_sensitivity

pytestmark = pytest.mark.gpu

BATCH = 16


@pytest.fixture(autouse=True)
def same_bits() -> Iterator[None]:
    with reproducible(strictly=True):  # attention as well
        yield


def base() -> nn.Module:
    """Eight blocks of a width at which copies take their time."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64, patch_size=8, embed_dim=512, depth=8, num_heads=8, num_classes=10
    )


def tuned(method: str, model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    options: dict[str, Any] = {}
    if method.startswith("spt"):
        values = {"budget": 40_000, "rank": 4}
        options = {name: v for name, v in values.items() if name in METHODS[method].options}
        options["sensitivity"] = skewed_sensitivity(model)
    return spt.methods[method](model, **options).model.train()


def train(model: nn.Module, autocast: torch.dtype | None, steps: int = 6) -> list[Tensor]:
    """Losses; nothing waits for the card in between."""
    optimizer: torch.optim.Optimizer
    if hasattr(model, "spt_tuning"):
        optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-3)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    torch.manual_seed(2)
    images = torch.randn(BATCH, 3, 64, 64).cuda()
    target = torch.randint(10, (BATCH,)).cuda()
    losses = []
    for _ in range(steps):
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return losses


def first_gradients(model: nn.Module, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Of everything that is trained, which loses them."""
    torch.manual_seed(3)
    images, target = torch.randn(BATCH, 3, 64, 64), torch.randint(10, (BATCH,))
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        F.cross_entropy(model(images.cuda()), target.cuda()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    states = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(states[name].cpu(), tensor.cpu()), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["spt-lora", "spt-unstructured", "lora-4", "partial-1"])
def test_a_card_trains_the_same(method: str, autocast: torch.dtype | None) -> None:
    expected, model = (tuned(method, base().cuda()) for _ in range(2))
    spt.offload(model)
    gradients = [first_gradients(each, autocast) for each in (model, expected)]
    different = [name for name, grad in gradients[1].items() if not grad.equal(gradients[0][name])]
    assert not different, "before any update"
    pairs = zip(train(model, autocast), train(expected, autocast), strict=True)
    for n, (loss, wanted) in enumerate(pairs):
        assert torch.equal(loss, wanted), n
    assert_same(model, expected)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_copies_that_are_slow_are_waited_for(ahead: int) -> None:
    expected, model = (tuned("spt-unstructured", base().cuda()) for _ in range(2))
    spt.offload(model, ahead=ahead)
    side = model.__dict__["_spt_streamed"][0]._side
    wait_stream = side.wait_stream

    def slow(stream: Any) -> None:
        wait_stream(stream)
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)  # cycles, about a millisecond before each copy

    side.wait_stream = slow
    pairs = zip(train(model, None), train(expected, None), strict=True)
    assert all(torch.equal(loss, wanted) for loss, wanted in pairs)
    assert_same(model, expected)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_peak_is_what_was_accounted(autocast: torch.dtype | None) -> None:
    plain = base()
    model = tuned("lora-4", copy.deepcopy(plain).cuda())
    dtype = "fp32" if autocast is None else "bf16-autocast"
    accounted = estimate_memory(
        plain, (BATCH, 3, 64, 64), method="lora-4", dtype=dtype, offload="frozen"
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
    spt.offload(model)
    train(model, autocast, steps=2)
    torch.cuda.reset_peak_memory_stats()
    train(model, autocast, steps=2)
    real = torch.cuda.max_memory_allocated() - before
    # cuBLAS takes up to 32 MiB for itself
    assert accounted.peak_bytes == pytest.approx(real, rel=0.05, abs=48 * 2**20)


@pytest.mark.parametrize("how", [{}, {"fused": True}])
def test_adamw_with_its_state_on_the_host_is_torchs(how: dict[str, Any]) -> None:
    models = [tuned("full", base().cuda()) for _ in range(2)]
    pieces = {"piece_bytes": 2**20}
    mine = spt.OffloadedAdamW(models[0].parameters(), lr=1e-3, **pieces, **how)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-3, **how)
    for seed in range(4):
        for model, optimizer in zip(models, (mine, theirs), strict=True):
            torch.manual_seed(seed)
            images, target = torch.randn(BATCH, 3, 64, 64), torch.randint(10, (BATCH,))
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(images.cuda()), target.cuda())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*models)
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            held = mine.state[param][name]
            assert held.is_pinned()
            assert torch.equal(held, theirs.state[other][name].cpu()), name


def test_a_model_comes_from_the_cpu_and_goes_back() -> None:
    expected, model = tuned("spt-unstructured", base().cuda()), tuned("spt-unstructured", base())
    before = torch.cuda.memory_allocated()
    streamed = sum(spt.offload(model, device="cuda").streamed.values())
    whole = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.memory_allocated() - before < 1.1 * (whole - streamed) + 2**22
    assert all(p.is_pinned() for p in model.parameters() if not p.is_cuda)
    pairs = zip(train(model, None), train(expected, None), strict=True)
    assert all(torch.equal(loss, wanted) for loss, wanted in pairs)
    spt.offload(model, "nothing", device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_same(model, expected)
