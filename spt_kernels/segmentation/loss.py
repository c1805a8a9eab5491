"""The loss of a label map: cross entropy over the labelled pixels, auxiliary heads included."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .ade20k import IGNORED


class PixelLoss:
    """Cross entropy, mean over the labelled pixels of a batch; without any it is zero.

    Args:
        auxiliary_weight: of the loss of each head but the first.
    """

    def __init__(self, auxiliary_weight: float) -> None:
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The loss of the scores of one head or of several, `[B, classes, height, width]`."""
        every = (outputs,) if isinstance(outputs, Tensor) else outputs
        count = (labels != IGNORED).sum().clamp(min=1)
        losses = [
            F.cross_entropy(scores.float(), labels, ignore_index=IGNORED, reduction="sum") / count
            for scores in every
        ]
        return losses[0] + self.auxiliary_weight * sum(losses[1:], losses[0].new_zeros(()))
