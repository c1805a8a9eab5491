"""How a method is trained: the paper's recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...approximation.choice import parse_approximation
from ...methods.method import (
    Method,
    check_none_is_lacking,
    check_number,
    check_one_of,
    check_positive,
    check_seed,
    check_within,
)
from ...offloading.words import OffloadWords
from ...recomputation.words import RecomputeWords

PRECISIONS = ("none", "bf16")
SCHEDULES = ("step", "epoch")

# Fields by which a step fits into a memory: what comes out is the same, up to rounding
HOW_IT_FITS = ("micro_batch", "recompute", "memory_bytes", "offload")

_FIRST_SHARE = 1e-3  # of the peak: the published code warms up from 1e-6 to 1e-3


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the paper's.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate. `None` is 1e-3, and 1e-4 for `full` and `partial-K`, where
            whole weights move.
        weight_decay: AdamW's; not on deltas, biases, norms and other vectors.
        warmup_epochs: epochs of linear warm-up. `None` is a tenth of `epochs`, as published.
        min_lr_share: the cosine ends at this share of `lr`.
        drop_path: stochastic depth. `None` is the published 0.1 where the architecture has it.
        label_smoothing: of the cross entropy.
        clip_grad: largest norm of the gradient, `None` for any.
        val_every: epochs between two looks at the validation images.
        patience: training ends early when so many epochs have not been better on the validation
            images than the best before them; `None` for never. Where it is spent with the last
            epoch, the run is a whole one, and one that is made longer ends there.
        amp: `"none"` or `"bf16"` autocast.
        seed: of the head's initial values, data order, dropout and augmentation.
        schedule: `"step"` changes the learning rate with each step, and the cosine begins where the
            warm-up ends. `"epoch"` is that of the published code, which steps timm's scheduler
            after each epoch with the number of the epoch that is over: the first two epochs have a
            thousandth of the peak, and the cosine runs over all epochs, so that the warm-up ends a
            little below the peak.
        approximate: what of the backward is approximate, for less memory: the words of
            `parse_approximation`, as `"gelu-2bit"`. `None` is nothing; `"nothing"` becomes that.
        micro_batch: images to a forward and backward; the gradients of a batch's parts are summed.
            `None` is all of a batch. Norms over the batch see a part of it.
        recompute: what the backward computes again to need less memory, to the same bits: in the
            words of `RecomputeWords`, as `"mlp"` or `"block@0-5,mlp@6-11"`. `None` is nothing;
            `"nothing"` becomes that.
        memory_bytes: of the card. What `micro_batch` and `recompute` say is then chosen so that a
            step fits and takes the least time; so many samples are measured at a time as fit, too.
        offload: what is on the host and comes to the device when it is used, to the same bits: in
            the words of `OffloadWords`, as `"frozen"` or `"state"`. `None` is nothing; `"nothing"`
            becomes that.
        preset: the name of the preset that the values started from; of no effect by itself.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 1e-4
    warmup_epochs: float | None = None
    min_lr_share: float = 0.01
    drop_path: float | None = None
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    val_every: int = 1
    patience: int | None = None
    amp: str = "none"
    seed: int = 0
    schedule: str = "step"
    approximate: str | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    memory_bytes: int | None = None
    offload: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        check_none_is_lacking(self)
        whole = ("epochs", "batch_size", "val_every", "patience", "micro_batch")
        for name in whole:
            check_number(name, getattr(self, name), int)
        check_seed(self.seed)
        for name in (*whole, "lr", "clip_grad", "memory_bytes"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected zero or more, got {value}")
        if self.patience is not None and self.patience < self.val_every:
            raise ValueError(
                f"patience: expected at least val_every ({self.val_every}) epochs, "
                f"got {self.patience}"
            )
        check_within("drop_path", self.drop_path, 0.0, 1.0)
        check_within("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_within("min_lr_share", self.min_lr_share, 0.0, 1.0)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected fewer than epochs ({self.epochs}), "
                f"got {self.warmup_epochs}"
            )
        check_one_of("amp", self.amp, PRECISIONS)
        check_one_of("schedule", self.schedule, SCHEDULES)
        rough = parse_approximation(self.approximate)  # or it says what is expected
        again, away = self.recompute, OffloadWords.parse(self.offload)  # likewise
        is_nothing = again is None or not RecomputeWords.parse(again).words
        if self.memory_bytes is not None and (self.micro_batch, again) != (None, None):
            raise ValueError(
                "memory_bytes: decides what micro_batch and recompute are; leave these out"
            )
        # one word for it, whether it was left out or said
        given = {"approximate": rough, "recompute": not is_nothing, "offload": away}
        for name, is_given in given.items():
            if not is_given:
                object.__setattr__(self, name, None)

    def images_at_once(self) -> int:
        """Images to a forward and backward, at most."""
        return min(self.batch_size, self.micro_batch or self.batch_size)

    def share_of(self, processes: int, n_images: int | None = None) -> int:
        """Images of a batch for one of so many processes, at most; a batch has no more than all.

        Args:
            processes: that share each batch.
            n_images: how many there are to train on; `None` for enough.
        """
        batch = self.batch_size if n_images is None else min(self.batch_size, n_images)
        return -(-batch // processes)

    def peak_lr(self, method: Method) -> float:
        """The learning rate at the end of the warm-up."""
        return default_lr(method) if self.lr is None else self.lr

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Share of the peak learning rate at `step`: linear warm-up, then half a cosine."""
        warmup = self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs
        if self.schedule == "epoch":
            epoch = max(0, step // steps_per_epoch - 1)
            if epoch < warmup:
                return _FIRST_SHARE + (1 - _FIRST_SHARE) * epoch / warmup
            return self._cosine(epoch / self.epochs)
        total, warmup = self.epochs * steps_per_epoch, warmup * steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self._cosine((step - warmup) / max(1.0, total - warmup))

    def _cosine(self, done: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.min_lr_share + (1 - self.min_lr_share) * cosine


def default_lr(method: Method) -> float:
    """The peak learning rate of a method where none is given: less where whole weights move."""
    return 1e-4 if method.entry.home in ("full", "last_blocks") else 1e-3
