"""`SharedStep`: a training step of which each of several processes takes a share of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import Processes
from .training_step import TrainingStep, tensors_of_batch


class SharedStep(TrainingStep):
    """Forward and backward on this process's share, and the update that the whole batch asks for.

    What is trained is small beside the model, so its gradients travel in one go after the backward.
    They are summed in the order of ranks, so that every process takes the same step to the bit.
    A process whose share is empty takes the step of the others.

    Attributes:
        processes: that share each batch; all are called as often.
    """

    def __init__(self, *arguments: Any, processes: Processes, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.processes = processes
        self._samples = 0

    def backward(self, *batch: Tensor, **named: Tensor) -> Tensor:
        """The gradients of the mean loss of this process's share, and that, 0 of none."""
        first, *_ = tensors_of_batch(batch, named)
        self._samples = len(first)
        if not self._samples:
            return torch.zeros_like(first.sum())
        return super().backward(*batch, **named)

    def update(self) -> None:
        """Step by the gradients of the mean loss of the whole batch."""
        self._share_gradients()
        super().update()

    @torch.no_grad()
    def _share_gradients(self) -> None:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        # what the loss does not depend on has none, and AdamW leaves it alone
        has_gradient = [param.grad is not None for param in trained]
        grads = [_in_fp32(param) for param in trained]
        told = torch.tensor(
            [self._samples, *has_gradient], dtype=torch.float32, device=trained[0].device
        )
        torch._foreach_mul_(grads, float(self._samples))
        self.processes.sum_([*grads, told])
        samples, *present = told.tolist()
        torch._foreach_div_(grads, samples)
        for param, grad, is_present in zip(trained, grads, present, strict=True):
            param.grad = grad.to(param.dtype) if is_present else None


def _in_fp32(param: Tensor) -> Tensor:
    """The gradient of a parameter, itself where it can be, else zeros."""
    if param.grad is None:
        return torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
    return param.grad.float().contiguous()
