"""`RunStep`: the step of a run, as CUDA graphs where that can be, else the ordinary one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distributed import Processes
from ...step import TrainingStep, capture_step
from ...step.shared_step import SharedStep
from ..progress import Progress


class StepRecipe(Protocol):
    """What of a recipe matters to one step."""

    @property
    def batch_size(self) -> int:
        """Images in it."""

    @property
    def clip_grad(self) -> float | None:
        """Largest norm of the gradient, `None` for any."""

    @property
    def amp(self) -> str:
        """`"none"` or `"bf16"` autocast."""


class RunStep:
    """Trains on a batch as the recipe says; calling it gives the loss.

    Args:
        model: made ready to train.
        optimizer: of what it trains, made with `capturable=True` where graphs are wanted.
        recipe: how.
        graph: whether to capture the step on the first batch. `None` does so on a card, and where
            it cannot be done goes on without; one line says so.
        device: of the batches.
        progress: told of it.
        loss_fn: of the model's output and the labels.
        processes: that share each batch; such steps are not captured.
        micro_batch: images to a forward and backward, `None` for all of a batch. Steps that part
            batches are not captured: what is larger than a card holds keeps it busy without.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: StepRecipe,
        graph: bool | None,
        device: torch.device,
        progress: Progress,
        loss_fn: Callable[[Any, Tensor], Tensor],
        processes: Processes | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self._args = model, loss_fn, optimizer
        self._options: dict[str, Any] = {
            "autocast": torch.bfloat16 if recipe.amp == "bf16" else None,
            "clip_grad": recipe.clip_grad,
        }
        self._micro_batch = micro_batch
        parted = {**self._options, "micro_batch": micro_batch}
        self._step: Any = TrainingStep(*self._args, **parted)
        if processes is not None and processes.size > 1:
            self._step = SharedStep(*self._args, processes=processes, **parted)
        self._batch_size, self._progress = recipe.batch_size, progress
        self._is_required = graph is True
        self._is_wanted = wants_graph(graph, device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch, of which the first is a whole one where there are such."""
        if self._is_wanted:
            self._is_wanted = False
            self._capture(images, labels)
        loss: Tensor = self._step(images, labels)
        return loss

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        try:
            if len(labels) < self._batch_size:  # the first of an epoch
                raise ValueError(f"no batch of {self._batch_size} images comes")
            if self._micro_batch is not None and self._micro_batch < self._batch_size:
                raise ValueError(f"a batch is trained on {self._micro_batch} images at a time")
            batch = images, labels
            self._step = capture_step(*self._args, batch, ragged="eager", **self._options)
        except (RuntimeError, ValueError) as reason:
            if self._is_required:
                raise ValueError(f"graph: the step cannot be captured: {reason}") from reason
            self._progress.say(f"steps run without CUDA graphs: {reason}")


def classification_loss(label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy of scores, in fp32 whatever they are in."""

    def loss_fn(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), labels, label_smoothing=label_smoothing)

    return loss_fn


def wants_graph(graph: bool | None, device: torch.device) -> bool:
    """Whether steps are to be captured.

    Raises:
        ValueError: it was asked for where there is no card.
    """
    if graph and device.type != "cuda":
        raise ValueError(f"graph: CUDA graphs need a CUDA device, got {device}")
    return device.type == "cuda" if graph is None else graph
