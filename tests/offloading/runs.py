"""Short runs of training, offloaded or not, that must come to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.methods import METHODS
from spt_kernels.offloading import blocks_on_host
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_vit

DEPTH = 3
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def tuned(method: str = "spt-lora", base: nn.Module | None = None, **options: Any) -> nn.Module:
    """A ViT of three blocks, or another model, tuned and in training mode."""
    base = tiny_vit(depth=DEPTH) if base is None else base
    torch.manual_seed(1)
    if method.startswith("spt"):
        values = {"budget": 500, "rank": 1, "dropout": 0.1, **options}
        options = {name: v for name, v in values.items() if name in METHODS[method].options}
        options["sensitivity"] = skewed_sensitivity(base)
    return spt.methods[method](base, **options).model.train()


def from_block(number: int) -> nn.Module:
    """A ViT of which a few entries of the blocks from `number` on are trained."""
    base = tiny_vit(depth=DEPTH)
    blocks = tuple(f"blocks.{n}." for n in range(number, DEPTH))
    late = {n: s for n, s in skewed_sensitivity(base).items() if n.startswith(blocks)}
    found = spt.Sensitivity.from_tensors(late, num_samples=4)
    return spt.apply(base, spt.allocate(found, 300)).train()


def sparse(model: nn.Module) -> torch.optim.Optimizer:
    return spt.SparseAdamW(spt.param_groups(model), lr=1e-2)


def torchs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loss_of(model: nn.Module, seed: int, *, autocast: bool = False, size: int = 16) -> Tensor:
    """Of four images."""
    images, labels = tiny_batch(seed=seed, size=size)
    images = images.to(next(p.dtype for p in model.parameters()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(images).float(), labels)


def train(
    model: nn.Module, optimizer: Optimizer = sparse, steps: int = 3, **how: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and copies of all that the model has in the end."""
    stepper = optimizer(model)
    torch.manual_seed(2)
    losses = []
    for seed in range(steps):
        loss = loss_of(model, seed, **how)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses, values_of(model)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    """Losses and states, to the last bit."""
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert found[1][name].dtype == tensor.dtype, name
        assert torch.equal(found[1][name], tensor), name


def there(model: nn.Module) -> list[str]:
    """Names of the streamed blocks whose weights take memory on the device now."""
    return [
        block.name
        for block in blocks_on_host(model)
        if any(buffer.untyped_storage().nbytes() for buffer in block.buffers)
    ]
