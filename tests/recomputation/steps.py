"""Steps of tiny models whose gradients, losses and next random number are compared to the bit."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels.plan import allocate
from spt_kernels.sensitivity import skewed_sensitivity
from spt_kernels.tuning import apply


class Outcome(NamedTuple):
    """What a forward and backward leave behind."""

    loss: Tensor
    grads: dict[str, Tensor]
    next_number: Tensor

    def is_same_as(self, other: Outcome) -> bool:
        """Whether all of it is, bit for bit."""
        return (
            torch.equal(self.loss, other.loss)
            and torch.equal(self.next_number, other.next_number)
            and self.grads.keys() == other.grads.keys()
            and all(torch.equal(grad, other.grads[name]) for name, grad in self.grads.items())
        )


def take_step(model: nn.Module, batch: tuple[Tensor, Tensor], *, autocast: bool = False) -> Outcome:
    """Loss and gradients of a batch, with the same random numbers each time."""
    images, target = batch
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(images), target)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    return Outcome(loss.detach(), grads, torch.rand(1))


def tuned(model: nn.Module, kind: str | None, dropout: float = 0.0) -> nn.Module:
    """A model tuned by made-up scores, whose new parameters are not at their start any more."""
    budget = sum(p.numel() for p in model.parameters()) // 30
    scores = skewed_sensitivity(model)
    apply(model, allocate(scores, budget, kind, rank=1, dropout=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.train()
