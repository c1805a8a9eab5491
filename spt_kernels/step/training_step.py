"""`TrainingStep`: what a training step computes, as an ordinary PyTorch loop does it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.call import check_batch, loss_in, parted


class TrainingStep:
    """Forward, backward and update on a batch; calling it gives the loss.

    It is called as `step(images, labels)`, or as `step(**batch)` with a mapping, as transformers
    has it.

    Attributes:
        model: called with the first tensor of a batch; or as `model(**batch)`.
        loss_fn: called with the model's output and the other tensors, of a mapping with its
            `labels`, which the model is then not given; gives a scalar. None, for mappings: the
            `loss` in the model's output.
        optimizer: of the parameters that are trained.
        autocast: dtype of the forward and the loss, None for that of the model.
        scaler: multiplies the loss and skips updates that overflowed; None without.
        clip_grad: largest norm of the gradient of all that the optimizer trains, None for any.
        accumulate: batches to an update, whose losses are averaged.
        micro_batch: samples to a forward and backward, None for all of a batch. Samples come first
            in every tensor. The gradients of the parts are summed; norms over the batch see a part.
        weigh: how many things the loss of a part is a mean over, called as the step is. None for
            one of each sample; of words, it counts those with a label. Parts of none are left out.

    Raises:
        ValueError: `accumulate`, `micro_batch` or `clip_grad` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad: float | None = None,
        accumulate: int = 1,
        micro_batch: int | None = None,
        weigh: Callable[..., Tensor | float] | None = None,
    ) -> None:
        part = 1 if micro_batch is None else micro_batch
        for name, number in (("accumulate", accumulate), ("micro_batch", part)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}: expected a whole number above zero, got {number!r}")
        if clip_grad is not None and not (clip_grad > 0 and math.isfinite(clip_grad)):
            raise ValueError(f"clip_grad: expected a number above zero, got {clip_grad}")
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.autocast, self.clip_grad, self.accumulate = autocast, clip_grad, accumulate
        self.micro_batch, self.weigh = micro_batch, weigh
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._batches = 0

    def __call__(self, *batch: Tensor, **named: Tensor) -> Tensor:
        """Train on one batch, with an update after each `accumulate` of them; its own loss.

        Where a batch fails, the next one begins another update, without what there was of this one.
        """
        if self._batches == 0:
            self.optimizer.zero_grad(set_to_none=True)
        batches, self._batches = self._batches + 1, 0
        loss = self.backward(*batch, **named)
        if batches == self.accumulate:
            self.update()
        else:
            self._batches = batches
        return loss

    def backward(self, *batch: Tensor, **named: Tensor) -> Tensor:
        """Add a batch's share of the gradients to what is there; its loss, detached.

        Raises:
            TypeError: no batch, or one both in order and by name.
            ValueError: no labels for `loss_fn`, by name what `micro_batch` cannot part, or weights
                that `weigh` cannot mean.
        """
        tensors = tensors_of_batch(batch, named)
        samples, most = len(tensors[0]), self.micro_batch
        if most is None or samples <= most:
            return self._backward_of_part(tensors, named, self.accumulate)
        if named:
            check_batch("batch", named, self.loss_fn)
        losses: list[Tensor] = []
        parts = list(zip(*(tensor.split(most) for tensor in tensors), strict=True))
        for part, share in zip(parts, self._shares(parts, named), strict=True):
            if share:
                losses.append(share * self._backward_of_part(part, named, self.accumulate / share))
        return torch.stack(losses).sum()

    def _shares(self, parts: list[tuple[Tensor, ...]], names: Mapping[str, Any]) -> list[float]:
        """What each part weighs of the whole."""
        weights = [float(len(part[0])) for part in parts]
        if self.weigh is not None:
            told = [
                self.weigh(**dict(zip(names, part, strict=True))) if names else self.weigh(*part)
                for part in parts
            ]
            # one wait for the device, not one a part
            weights = torch.stack([torch.as_tensor(n).double().reshape(()) for n in told]).tolist()
        whole = sum(weights)
        if not 0 < whole < math.inf or min(weights) < 0:
            raise ValueError(
                "weigh: expected of each part how many things its loss is a mean over, not all 0, "
                f"got {weights}"
            )
        return [weight / whole for weight in weights]

    def _backward_of_part(
        self, part: tuple[Tensor, ...], names: Iterable[str], divisor: float
    ) -> Tensor:
        """Add the gradients of a part's loss over `divisor`; the loss, detached."""
        casting: Any = contextlib.nullcontext()
        if self.autocast is not None:
            casting = torch.autocast(part[0].device.type, self.autocast)
        with casting:
            loss = self._loss(part, dict(zip(names, part, strict=False)))
        divided = loss if divisor == 1 else loss / divisor
        (divided if self.scaler is None else self.scaler.scale(divided)).backward()
        return loss.detach()

    def _loss(self, part: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
        if named:
            inputs, labels = parted(named, self.loss_fn)
            output = self.model(**inputs)
            if self.loss_fn is None:
                return loss_in(output, "batch")
            return self.loss_fn(output, labels)
        if self.loss_fn is None:
            raise TypeError("loss_fn: None is for batches by name, as step(**batch)")
        return self.loss_fn(self.model(part[0]), *part[1:])

    def update(self) -> None:
        """Clip the gradients and let the optimizer step."""
        try:
            self._update()
        except BaseException:
            if self.scaler is not None:  # which would take the next gradients for unscaled ones
                with contextlib.suppress(Exception):
                    self.scaler.update()
                for told in ("grad_scale", "found_inf"):  # by it, and multiplied with the next one
                    vars(self.optimizer).pop(told, None)
            raise
        if self.scaler is not None:
            self.scaler.update()

    def _update(self) -> None:
        if self.clip_grad is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.clip_grad)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)


def tensors_of_batch(batch: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The tensors of a call, which is given them in order or by name.

    Raises:
        TypeError: it is given none, or some in both ways.
    """
    if bool(batch) == bool(named):
        raise TypeError("expected a batch as step(images, labels) or as step(**batch)")
    return batch or tuple(named.values())
