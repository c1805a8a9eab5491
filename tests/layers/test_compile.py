"""Tuned layers under torch.compile: one graph, the same gradients as without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import AdapterSpec, LoraSpec, Plan, apply
from spt_kernels.layers import SparseDeltaConv2d, SparseDeltaLinear, sparse_deltas
from spt_kernels.model import describe, head_names
from tests.models import tiny_batch, tiny_vit


@pytest.fixture(autouse=True)
def _fresh_dynamo():  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: nn.Module, run: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_whole_vit_with_everything_on_it_is_one_graph() -> None:
    model = tiny_vit(depth=1)
    info, head = describe(model), head_names(model)
    info = {name: what for name, what in info.items() if name not in head}
    fc1, qkv, proj = (f"blocks.0.{n}.weight" for n in ("mlp.fc1", "attn.qkv", "attn.proj"))
    specs = {
        fc1: LoraSpec(2, ((0, 96),), 24, 1.0, 0.0),
        qkv: LoraSpec(2, ((0, 24), (48, 72)), 24, 1.0, 0.0),
        proj: AdapterSpec(2, ((0, 24),)),
    }
    positions = {
        name: torch.arange(what.numel // 3, 2 * what.numel // 3, 5)
        for name, what in info.items()
        if name not in (fc1, proj)
    }
    apply(model, Plan(positions, specs, info, head=head)).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b", "up_weight", "delta")):
            nn.init.normal_(parameter, std=0.02)
    images, _ = tiny_batch()
    expected = gradients(model, model, images)
    assert len(expected) > 20
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = gradients(model, compiled, images)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)

    # an optimizer step reaches the weights although a compiled forward does not look
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    for delta in sparse_deltas(model).values():
        held = delta.target.view(-1)[delta.index.long()]
        assert torch.equal(held, delta.original + delta.delta)
    assert torch.allclose(compiled(images), model(images), atol=1e-5)


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseDeltaConv2d(nn.Conv2d(3, 8, 4, 4), torch.arange(0, 384, 7), torch.tensor([1])),
        nn.GELU(),
        SparseDeltaConv2d(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.arange(0, 72, 5)),
    )
    x = torch.randn(2, 3, 16, 16)
    expected = gradients(model, model, x)
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    assert len(expected) == 3
    assert F.gelu(x).shape == x.shape


def test_a_delta_dense_enough_for_blocks_of_the_dense_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseDeltaLinear(nn.Linear(24, 16), torch.arange(0, 384, 2)), nn.GELU())
    assert model[0].__dict__["_spt_pattern"].whole._plan
    x = torch.randn(3, 5, 24)
    expected = gradients(model, model, x)
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert set(expected) == {"0.delta"}
    torch.testing.assert_close(actual["0.delta"], expected["0.delta"])
