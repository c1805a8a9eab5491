"""How a segmentation model is trained: SETR's schedule on ADE20K."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..finetuning.job.recipe import PRECISIONS, default_lr
from ..methods.method import (
    Method,
    check_none_is_lacking,
    check_number,
    check_one_of,
    check_positive,
    check_seed,
    check_within,
)
from ..recomputation.words import RecomputeWords

_LONGEST_WARMUP = 1500  # iterations


@dataclass(frozen=True)
class SegmentationRecipe:
    """How a model is trained. Length, batch and decay of the learning rate are SETR's on ADE20K.

    The optimizer is AdamW, as everywhere here, at the learning rates of the other tasks.

    Attributes:
        iterations: training steps.
        batch_size: images per step.
        lr: peak learning rate. `None` is 1e-3, and 1e-4 for `full` and `partial-K`, where
            whole weights move.
        weight_decay: AdamW's; not on deltas, biases, norms and other vectors.
        warmup_iterations: of linear warm-up. `None` is a tenth of `iterations`, at most 1,500.
        power: of the polynomial by which the learning rate falls.
        min_lr_share: it ends at this share of `lr`.
        auxiliary_weight: of the loss of each auxiliary head.
        drop_path: stochastic depth.
        clip_grad: largest norm of the gradient, `None` for any.
        val_every: iterations between two looks at the scenes that are held out, if any are.
        patience: training ends early when so many iterations have not been better on these than the
            best before them; `None` for never. Where it is spent with the last one, the run is a
            whole one, and one that is made longer ends there.
        amp: `"none"` or `"bf16"` autocast.
        recompute: what of the backbone the backward computes again to need less memory, to the same
            bits: in the words of `RecomputeWords`, as `"mlp"`. `None` is nothing;
            `"nothing"` becomes that.
        seed: of the head's initial values, data order, dropout and augmentation.
    """

    iterations: int = 160_000
    batch_size: int = 16
    lr: float | None = None
    weight_decay: float = 1e-4
    warmup_iterations: int | None = None
    power: float = 0.9
    min_lr_share: float = 0.1
    auxiliary_weight: float = 0.4
    drop_path: float = 0.0
    clip_grad: float | None = None
    val_every: int = 2000
    patience: int | None = None
    amp: str = "none"
    recompute: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_none_is_lacking(self)
        for name in ("iterations", "batch_size", "warmup_iterations", "val_every", "patience"):
            check_number(name, getattr(self, name), int)
        check_seed(self.seed)
        for name in ("iterations", "batch_size", "lr", "power", "clip_grad"):
            check_positive(name, getattr(self, name))
        for name in ("val_every", "patience"):
            check_positive(name, getattr(self, name))
        if self.patience is not None and self.patience < self.val_every:
            raise ValueError(
                f"patience: expected at least val_every ({self.val_every}) iterations, "
                f"got {self.patience}"
            )
        for name in ("weight_decay", "warmup_iterations", "auxiliary_weight"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected zero or more, got {value}")
        check_within("drop_path", self.drop_path, 0.0, 1.0)
        check_within("min_lr_share", self.min_lr_share, 0.0, 1.0)
        if self.warmup_iterations is not None and self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations: expected fewer than iterations ({self.iterations}), "
                f"got {self.warmup_iterations}"
            )
        check_one_of("amp", self.amp, PRECISIONS)
        # or it says what is expected
        if self.recompute is not None and not RecomputeWords.parse(self.recompute).words:
            object.__setattr__(self, "recompute", None)

    def peak_lr(self, method: Method) -> float:
        """The learning rate at the end of the warm-up."""
        return default_lr(method) if self.lr is None else self.lr

    def lr_factor(self, iteration: int) -> float:
        """Share of the peak learning rate at `iteration`: linear warm-up, then a polynomial."""
        warmup = self.warmup_iterations
        if warmup is None:
            warmup = min(_LONGEST_WARMUP, self.iterations // 10)
        if iteration < warmup:
            return (iteration + 1) / (warmup + 1)
        left = 1 - min(1.0, (iteration - warmup) / max(1, self.iterations - warmup))
        return self.min_lr_share + (1 - self.min_lr_share) * left**self.power
