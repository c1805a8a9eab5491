"""Short runs of training, captured or not, that must come to the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.methods import METHODS
from spt_kernels.sensitivity import skewed_sensitivity
from spt_kernels.step import TrainingStep, capture_step
from tests.models import tiny_batch, tiny_vit

NAMES = ("spt-lora", "spt-unstructured", "spt-adapter", "lora-2", "full")
Make = Callable[[nn.Module], torch.optim.Optimizer]


def tuned(method: str, device: str, *, dropout: float = 0.0) -> nn.Module:
    """A ViT of one block on a device, in training mode; `dropout` is that of a LoRA's input."""
    plain = tiny_vit(depth=1)
    torch.manual_seed(1)
    options: dict[str, Any] = {}
    if method.startswith("spt"):
        read = METHODS[method].options
        values = {"budget": 400, "rank": 1, "dropout": dropout}
        options = {name: value for name, value in values.items() if name in read}
        options["sensitivity"] = skewed_sensitivity(plain)
    return spt.methods[method](plain.to(device), **options).model.train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Torch's, as a graph can hold it."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=1e-2, fused=True, capturable=True)


def batches(n: int, device: str, last: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Different batches of four images, and perhaps one of `last`."""
    made = [tiny_batch(seed=seed) for seed in range(n)]
    if last is not None:
        made[-1] = tiny_batch(last, seed=n)
    return [(images.to(device), labels.to(device)) for images, labels in made]


def train(
    captured: bool,
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    between: Callable[[int, torch.optim.Optimizer], None] = lambda n, optimizer: None,
    ragged: str = "error",
    **options: Any,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, and the state of the model and of the optimizer in the end, on the CPU.

    Args:
        captured: or in an ordinary loop.
        model: on the device of the data.
        data: a step on each of them.
        optimizer: that of `adamw` if none is given.
        between: called before each step.
        ragged: for `capture_step`.
        options: for either.
    """
    optimizer = optimizer or adamw(model)
    for group in optimizer.param_groups:  # the same arithmetic in both
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], device=data[0][0].device)
    torch.manual_seed(7)
    step: Any = TrainingStep(model, F.cross_entropy, optimizer, **options)
    if captured:
        step = capture_step(model, F.cross_entropy, optimizer, data[0], ragged=ragged, **options)
    losses = []
    for n, batch in enumerate(data):
        between(n, optimizer)
        losses.append(step(*batch))
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for n, of_param in enumerate(optimizer.state.values()):
        state |= {f"{n}.{name}": value.cpu() for name, value in of_param.items()}
    return [loss.cpu() for loss in losses], copy.deepcopy(state)


def assert_same(
    one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]]
) -> None:
    """Every loss, and everything in the end, to the last bit."""
    for n, (loss, expected) in enumerate(zip(one[0], other[0], strict=True)):
        assert torch.equal(loss, expected), f"loss {n}: {loss} and {expected}"
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name
