"""The training loop of a segmentation model: iterations, a line now and then, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..finetuning.folder.checkpoint import Checkpoint
from ..finetuning.progress import Progress, Silent
from ..finetuning.training.best import BestSoFar
from ..finetuning.training.run_step import RunStep, wants_graph
from ..methods.tunable import make_optimizer
from .crops import CropBatches
from .loss import PixelLoss
from .recipe import SegmentationRecipe

REPORT_EVERY = 50  # iterations
NO_LABEL = (
    "data: no training image that was looked at has a label: in a label map 0 and 255 are no class"
)


@dataclass(frozen=True)
class IterationFigures:
    """What the iterations since the last figures were like.

    Attributes:
        iteration: how many are done.
        train_loss: mean over these, auxiliary heads included.
        lr: at the last of them.
        step_ms: mean time of a step, data and optimizer included.
        val_miou: after them, where scenes that are held out were looked at; in 0 to 1.
    """

    iteration: int
    train_loss: float
    lr: float
    step_ms: float
    val_miou: float | None = None

    @property
    def at(self) -> int:
        """The iteration."""
        return self.iteration

    def scalars(self) -> dict[str, float | None]:
        """Each figure by the name that it is shown under."""
        return {
            "loss/train": self.train_loss,
            "mIoU/validation": self.val_miou,
            "learning rate": self.lr,
            "milliseconds of a step": self.step_ms,
        }


def train_segmentation(
    model: nn.Module,
    batches: CropBatches,
    recipe: SegmentationRecipe,
    *,
    lr: float,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_figures: Callable[[list[IterationFigures]], None] | None = None,
    on_new_figures: Callable[[IterationFigures], object] | None = None,
    look: Callable[[], float] | None = None,
    best: BestSoFar | None = None,
    graph: bool | None = None,
    progress: Progress | None = None,
    report_every: int = REPORT_EVERY,
) -> list[IterationFigures]:
    """Train what of `model` requires a gradient, in place.

    Args:
        model: a `Setr` made ready by `methods.tune`, on the device of `batches`.
        batches: squares of the training scenes.
        recipe: how.
        lr: the peak learning rate.
        checkpoint: a file to go on from if it is there, and to keep the state in. It may be of a
            recipe with fewer iterations: the learning rate follows this recipe's schedule from
            there.
        checkpoint_seconds: least time between two checkpoints; the end of training always has one.
        on_figures: called at each report, and once when going on, with all figures so far.
        on_new_figures: called with the figures of each report that this call trains, when what
            there is to keep of it is kept.
        look: gives the mIoU of the model as it is, on scenes that are held out.
        best: noted in, with `look`, what was trained by the best iteration, among equals the first.
        graph: whether steps run as CUDA graphs; `None` lets them on a card where they can.
        progress: told of every step.
        report_every: iterations from one report, and possible checkpoint, to the next.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: `graph` is asked for and cannot be; or no pixel has a label in the first 50
            iterations, or in as many as look at every scene once, or in all there are.
    """
    progress = progress or Silent()
    capturable = wants_graph(graph, batches.device)
    optimizer = make_optimizer(model, lr, recipe.weight_decay, capturable=capturable)
    loss_fn = PixelLoss(recipe.auxiliary_weight)
    step = RunStep(model, optimizer, recipe, graph, batches.device, progress, loss_fn)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.lr_factor)
    history: list[IterationFigures] = []
    best = BestSoFar() if best is None else best
    if checkpoint is not None and checkpoint.is_file():
        state = Checkpoint.load(checkpoint)
        state.restore(model, optimizer, scheduler)
        history = [IterationFigures(**figures) for figures in state.history]
        best.go_on(state, {r.iteration: (r.val_miou,) for r in history if r.val_miou is not None})
        progress.say(f"going on after iteration {state.epoch:,} of {recipe.iterations:,}")
        if on_figures is not None:
            on_figures(history)
    done = history[-1].iteration if history else 0
    progress.start("training", recipe.iterations)
    progress.advance(done)
    model.train()
    stream = batches.between(done, recipe.iterations)
    one_pass = -(-len(batches.scenes) // batches.batch_size)  # iterations
    last_saved = time.monotonic()
    while done < recipe.iterations and not best.is_over(recipe.patience):
        # to the next report, or look, or to the end
        every = (report_every,) if look is None else (report_every, recipe.val_every)
        count = min(recipe.iterations - done, *(each - done % each for each in every))
        total = torch.zeros((), device=batches.device)
        started = time.perf_counter()
        for _ in range(count):
            total += step(*next(stream))
            scheduler.step()
            progress.advance(1)
        mean_loss = float(total) / count  # waits for the device
        done += count
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"the loss is {mean_loss} by iteration {done}: try a lower learning rate"
            )
        # a decoder that has learnt nothing has a loss of zero where nothing has a label alone
        is_unlabelled = mean_loss == 0 and not any(row.train_loss for row in history)
        if is_unlabelled and done >= min(REPORT_EVERY, recipe.iterations, one_pass):
            raise ValueError(NO_LABEL)
        step_ms = 1e3 * (time.perf_counter() - started) / count
        figures = IterationFigures(done, mean_loss, lr * recipe.lr_factor(done - 1), step_ms)
        is_last = done == recipe.iterations
        progress.advance(0, f"loss {mean_loss:.3f}")
        if look is not None and (is_last or done % recipe.val_every == 0):
            miou = look()
            figures = replace(figures, val_miou=miou)
            best.look(done, (miou,), model)
            progress.say(f"iteration {done:,} · validation mIoU {100 * miou:.2f} %")
        history.append(figures)
        if on_figures is not None:
            on_figures(history)
        due = (
            is_last
            or best.is_over(recipe.patience)
            or time.monotonic() - last_saved >= checkpoint_seconds
        )
        if checkpoint is not None and due:
            rows = [asdict(row) for row in history]
            taken = Checkpoint.take(done, model, optimizer, scheduler, rows, best.best)
            taken.save(checkpoint)
            last_saved = time.monotonic()
        if on_new_figures is not None:
            on_new_figures(figures)
    if done < recipe.iterations:
        progress.say(best.last_words(recipe.patience, "iteration"))
    model.eval()
    return history
