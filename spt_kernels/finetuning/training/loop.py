"""The training loop: epochs over batches, a look at the validation images, a line, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import nn

from ...methods.tunable import make_optimizer
from ...offloading import OffloadWords
from ..device import seed_share
from ..folder.checkpoint import Checkpoint
from ..images.pixels import Batches
from ..job.recipe import Recipe
from ..progress import Progress, Silent
from .accuracy import evaluate
from .best import BestSoFar, Rank
from .run_step import RunStep, classification_loss, wants_graph


@dataclass(frozen=True)
class EpochFigures:
    """What one epoch of training was like.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over its images, in training mode.
        lr: at its last step.
        step_ms: mean time of a step, data and optimizer included.
        val_loss: after it, where validation images were looked at.
        val_accuracy: likewise, top-1 in 0 to 1.
    """

    epoch: int
    train_loss: float
    lr: float
    step_ms: float
    val_loss: float | None = None
    val_accuracy: float | None = None

    @property
    def at(self) -> int:
        """The epoch."""
        return self.epoch

    def scalars(self) -> dict[str, float | None]:
        """Each figure by the name that it is shown under."""
        return {
            "loss/train": self.train_loss,
            "loss/validation": self.val_loss,
            "accuracy/validation": self.val_accuracy,
            "learning rate": self.lr,
            "milliseconds of a step": self.step_ms,
        }


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    lr: float,
    val: Batches | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_epoch: Callable[[list[EpochFigures]], None] | None = None,
    on_new_epoch: Callable[[EpochFigures], object] | None = None,
    graph: bool | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    best: BestSoFar | None = None,
    stage: str = "training",
    before_step: Callable[[int], object] = lambda _: None,
) -> list[EpochFigures]:
    """Train what of `model` requires a gradient, in place; the last epoch's model is the result.

    Where processes share the batches, all of them call this, and end with the same model; the first
    writes the checkpoint.

    Args:
        model: made ready by `methods.tune`, on the device of `batches`.
        batches: the training images.
        recipe: how.
        lr: the peak learning rate.
        val: validation images, to report on and to know the best epoch by.
        checkpoint: a file to go on from if it is there, and to keep the state in. It may be of a
            recipe with fewer epochs: the learning rate follows this recipe's schedule from there.
        checkpoint_seconds: least time between two checkpoints; the end of training always has one.
        on_epoch: called after each epoch, and once when going on, with all figures so far.
        on_new_epoch: called with the figures of each epoch that this call trains, when what there
            is to keep of it is kept.
        graph: whether steps run as CUDA graphs; `None` lets them on a card where they can. Where
            something is offloaded they do not.
        progress: told of every step.
        tell: given a line per epoch: its figures, and the seconds that it took.
        best: noted in, with `val`, what the best epoch trained: that of the highest accuracy, among
            several such of the lowest loss, among these the first.
        stage: what `progress` is told that this is.
        before_step: called with the number of each step, over all epochs, before it runs.

    Raises:
        FloatingPointError: the loss is not finite.
        OtherProcessFailed: likewise, in all processes but the first.
        ValueError: `graph` is asked for and cannot be.
    """
    progress, processes = progress or Silent(), batches.processes
    away = OffloadWords.parse(recipe.offload)
    graph = False if away else graph
    optimizer = make_optimizer(
        model,
        lr,
        recipe.weight_decay,
        capturable=wants_graph(graph, batches.device),
        state_on_host=away.state,
    )
    loss_fn = classification_loss(recipe.label_smoothing)
    step = RunStep(
        model,
        optimizer,
        recipe,
        graph,
        batches.device,
        progress,
        loss_fn,
        processes,
        recipe.micro_batch,
    )
    steps_per_epoch = len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.lr_factor(step, steps_per_epoch)
    )
    history: list[EpochFigures] = []
    best = BestSoFar() if best is None else best
    if checkpoint is not None and checkpoint.is_file():
        state = Checkpoint.load(checkpoint)
        state.restore(model, optimizer, scheduler)
        history = [EpochFigures(**figures) for figures in state.history]
        best.go_on(state, {r.epoch: _rank(r) for r in history if r.val_accuracy is not None})
        if tell is not None:
            tell(f"going on after epoch {len(history)} of {recipe.epochs}")
        if on_epoch is not None:
            on_epoch(history)

    progress.start(stage, recipe.epochs * steps_per_epoch)
    progress.advance(len(history) * steps_per_epoch)
    last_saved = time.monotonic()
    while len(history) < recipe.epochs and not best.is_over(recipe.patience):
        epoch = len(history)
        started = time.monotonic()
        _training_mode(model)
        if processes.size > 1:
            seed_share(recipe.seed, epoch, processes.rank)
        note = f"epoch {epoch + 1}/{recipe.epochs}"
        mean_loss, step_ms = _train_epoch(
            step, batches, scheduler, epoch, note, progress, before_step
        )
        if not math.isfinite(mean_loss):  # in all processes alike
            processes.together(partial(_diverged, mean_loss, epoch + 1))
        progress.advance(0, f"{note} · loss {mean_loss:.3f}")
        last_lr = lr * recipe.lr_factor((epoch + 1) * steps_per_epoch - 1, steps_per_epoch)
        figures = EpochFigures(epoch + 1, mean_loss, last_lr, step_ms)
        is_last = epoch + 1 == recipe.epochs
        if val is not None and (is_last or (epoch + 1) % recipe.val_every == 0):
            seen = evaluate(model, val, amp=recipe.amp, processes=processes)
            figures = replace(figures, val_loss=seen.loss, val_accuracy=seen.top1)
            best.look(epoch + 1, _rank(figures), model)
        history.append(figures)
        now = time.monotonic()
        if tell is not None:
            tell(_line(figures, recipe.epochs, now - started))
        if on_epoch is not None:
            on_epoch(history)
        due = is_last or best.is_over(recipe.patience) or now - last_saved >= checkpoint_seconds
        if checkpoint is not None and due and processes.is_first:
            rows = [asdict(row) for row in history]
            taken = Checkpoint.take(
                *(epoch + 1, model, optimizer, scheduler, rows, best.best),
                recipe.images_at_once(),
            )
            taken.save(checkpoint)
            last_saved = time.monotonic()
        if on_new_epoch is not None:
            on_new_epoch(figures)
    if len(history) < recipe.epochs and tell is not None:
        tell(best.last_words(recipe.patience, "epoch"))
    model.eval()
    return history


def _diverged(loss: float, epoch: int) -> NoReturn:
    raise FloatingPointError(f"the loss is {loss} in epoch {epoch}: try a lower learning rate")


def _rank(figures: EpochFigures) -> Rank:
    """By which validated epochs are compared, the best the highest."""
    assert figures.val_accuracy is not None
    assert figures.val_loss is not None
    return figures.val_accuracy, -figures.val_loss


def _line(figures: EpochFigures, epochs: int, seconds: float) -> str:
    """One epoch as a line of a log."""
    parts = [f"epoch {figures.epoch:>{len(str(epochs))}}/{epochs}"]
    parts.append(f"loss {figures.train_loss:.4f}")
    if figures.val_accuracy is not None:
        parts.append(f"val loss {figures.val_loss:.4f}")
        parts.append(f"val accuracy {100 * figures.val_accuracy:.1f} %")
    return " · ".join([*parts, f"lr {figures.lr:.2e}", f"{seconds:.1f} s"])


class Timed(Protocol):
    """Figures of a part of a training."""

    @property
    def step_ms(self) -> float:
        """Milliseconds of one of its steps."""


def median_step_ms(history: Sequence[Timed]) -> float:
    """Median over its parts, the first one (which warms up) left out where there are others."""
    times = sorted(row.step_ms for row in (history[1:] or history))
    return times[len(times) // 2]


def _train_epoch(
    step: RunStep,
    batches: Batches,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
    note: str,
    progress: Progress,
    before_step: Callable[[int], object],
) -> tuple[float, float]:
    """The mean loss of an epoch, and the milliseconds of a step."""
    total = torch.zeros((), device=batches.device)
    started = time.perf_counter()
    for number, (images, labels) in enumerate(batches.epoch(epoch)):
        before_step(epoch * len(batches) + number)
        loss = step(images, labels)
        scheduler.step()
        total += loss * len(labels)
        progress.advance(1, note)
    batches.processes.sum_([total])
    mean_loss = float(total / len(batches.pixels))  # waits for the device
    return mean_loss, 1e3 * (time.perf_counter() - started) / len(batches)


def check_sharable(model: nn.Module, method: str) -> None:
    """Refuse a model whose norms would see this process's share of a batch where they see all.

    Raises:
        ValueError: a norm of it takes statistics of batches when it is trained.
    """
    name = _norm_of_batches(model)
    if name is not None:
        raise ValueError(
            f"method: {method!r} trains {name} by statistics of whole batches, of which a "
            "process has a share: run it in one process, or take a method of spt-*"
        )


def check_goes_on(model: nn.Module, recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on from what is damaged, or in other parts of a batch where that matters.

    Args:
        model: made ready to train.
        recipe: how, from here on.
        checkpoint: what there is to go on from, if it is there.

    Raises:
        ValueError: it cannot be read, or is of another model; or a norm of the model takes
            statistics of the images that come at once, and these were as many as they will not be.
    """
    begun = Checkpoint.begun(checkpoint, model)
    if begun is None:
        return
    name = _norm_of_batches(model)
    was, now = begun.images_at_once, recipe.images_at_once()
    if name is not None and was not in (None, now):
        raise ValueError(
            f"micro_batch: {name} takes statistics of the images that come at once, which were "
            f"{was} in this run so far, got {now}: micro_batch={was} with recompute goes on with it"
        )


def _norm_of_batches(model: nn.Module) -> str | None:
    """The first norm that takes statistics of what comes at once when the model is trained."""
    _training_mode(model)
    named = model.named_modules()
    return next((n for n, m in named if m.training and _keeps_statistics(m)), None)


def _training_mode(model: nn.Module) -> None:
    """Training mode, save for the running statistics of norms in a tuned model.

    They belong to the base model, which a task file finds as it was.
    """
    model.train()
    if hasattr(model, "spt_tuning"):
        for module in model.modules():
            if _keeps_statistics(module):
                module.eval()


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a norm with running statistics; an EvoNorm of batches has no mean."""
    return not {"running_mean", "running_var"}.isdisjoint(module._buffers)
