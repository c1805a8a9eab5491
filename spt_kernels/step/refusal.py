"""What of a step cannot be captured, said before anything is touched."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.call import check_batch
from ..model.check import check_not_offloaded
from ..offloading import OffloadedAdamW
from .training_step import TrainingStep

RAGGED = ("error", "eager")
_OF_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_arguments(
    batch: Any,
    loss_fn: Callable[..., Any] | None,
    ragged: str,
) -> dict[int | str, Tensor]:
    """The batch by place or by name; raise for an argument that nothing could be made of."""
    made: dict[int | str, Tensor] = {}
    if isinstance(batch, Mapping):
        made.update(check_batch("batch", batch, loss_fn))
    elif isinstance(batch, Sequence) and batch and all(isinstance(p, Tensor) for p in batch):
        made.update(enumerate(batch))
        if loss_fn is None:
            raise TypeError(
                "loss_fn: None is for a batch that is a mapping, whose loss the model computes"
            )
    else:
        raise TypeError(
            "batch: expected tensors, as (images, labels), or a mapping to such, got "
            f"{type(batch).__name__}"
        )
    if ragged not in RAGGED:
        raise ValueError(f"ragged: expected one of {', '.join(RAGGED)}, got {ragged!r}")
    return made


def check_step(
    step: TrainingStep, batch: Mapping[int | str, Tensor], *, allow_hooks: bool
) -> torch.device:
    """The card that all of a step is on.

    Raises:
        TypeError: the model is no module, or the optimizer none of torch's.
        ValueError: something is on another device, or cannot be captured.
    """
    if not isinstance(step.model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(step.model).__name__}")
    if not isinstance(step.optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(step.optimizer).__name__}"
        )
    if isinstance(step.model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: DistributedDataParallel cannot be captured here; pass its module")
    check_not_offloaded(step.model, "capture a step of")
    device = _device_of(step.model)
    for place, part in batch.items():
        if part.device != device:
            raise ValueError(
                f"batch[{place!r}]: expected a tensor on {device}, got one on {part.device}"
            )
    if torch.is_autocast_enabled("cuda"):
        raise ValueError(
            "autocast is on: call capture_step outside of it and pass autocast=torch.bfloat16"
        )
    _check_optimizer(step)
    if not allow_hooks:
        for name, hook in _hooks_of(step):
            if isinstance(hook, types.BuiltinFunctionType):
                continue  # written in C, as a tensor's method is
            raise ValueError(
                f"{name} has a hook, {_told(hook)}, that Python would run while the step is "
                "captured and never again: remove it, or pass allow_hooks=True if all that it does "
                "is computed on the card"
            )
    return device


def _device_of(model: nn.Module) -> torch.device:
    device: torch.device | None = None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cuda":
            raise ValueError(
                f"model: expected all of it on a CUDA device, {name} is on {tensor.device}"
            )
        if device is not None and tensor.device != device:
            raise ValueError(f"model: expected one device, got {device} and {tensor.device}")
        device = tensor.device
    if device is None:
        raise ValueError("model: expected one with parameters, got none")
    return device


def _check_optimizer(step: TrainingStep) -> None:
    optimizer = step.optimizer
    kind = type(optimizer).__name__
    if isinstance(optimizer, OffloadedAdamW):
        raise ValueError(
            f"optimizer: {kind} has its state on the host, where no graph finds it: take "
            "torch.optim.AdamW or SparseAdamW, with capturable=True"
        )
    for group in optimizer.param_groups:
        # torch's SGD has no such option, and reads the learning rate from the card if fused
        way = "capturable" if "capturable" in group else "fused"
        if way not in group:
            raise ValueError(
                f"optimizer: {kind} has no option capturable, so its step would be captured with "
                "the numbers of now: take SparseAdamW or one of torch.optim that has it"
            )
        if not group[way]:
            raise ValueError(
                f"optimizer: {kind} was made with {way}={group[way]}, so its step reads numbers "
                f"from the host: make it with {kind}(..., {way}=True)"
            )
    if step.scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"scaler: {kind} lets GradScaler wait for the card on every step: make it with "
            f"{kind}(..., fused=True), or take SparseAdamW"
        )


def check_no_new_hooks(step: TrainingStep, since: int) -> None:
    """Refuse a hook that was put on what a step runs after it was captured.

    Args:
        step: as it was captured.
        since: `next_hook_id` of then.

    Raises:
        RuntimeError: there is one; says on what.
    """
    for name, hook in _hooks_of(step, since):
        raise RuntimeError(
            f"{name} has a hook, {_told(hook)}, that was put there after the step was captured, "
            "which never runs it: remove it, or capture the step anew"
        )


def _hooks_of(step: TrainingStep, since: int = 0) -> Iterator[tuple[str, Any]]:
    """Name of what has one -> a hook that is not ours, of those whose number is `since` or more."""
    for name, module in step.model.named_modules():
        for kind in _OF_MODULES:
            yield from _foreign(name or "model", vars(module).get(kind), since)
    for kind in _OF_MODULES:
        yield from _foreign("every module", getattr(nn.modules.module, f"_global{kind}"), since)
    for name, parameter in step.model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            yield from _foreign(name, getattr(parameter, kind, None), since)
    for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        yield from _foreign("optimizer", vars(step.optimizer).get(kind), since)


def _foreign(name: str, hooks: Mapping[int, Any] | None, since: int) -> Iterator[tuple[str, Any]]:
    for number, hook in (hooks or {}).items():
        module = getattr(hook, "__module__", None) or ""
        if number >= since and module.partition(".")[0] != __package__.partition(".")[0]:
            yield name, hook


def _told(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", hook))
