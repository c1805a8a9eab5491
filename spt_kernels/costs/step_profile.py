"""What a call asks of its host and of the card, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_OWN = ("aten::", "spt::")


@dataclass(frozen=True)
class StepProfile:
    """What one call did.

    Attributes:
        operators: dispatched, those that others are made of included.
        kernels: that the card ran, copies and fills included; 0 where none was seen.
        kernel_ms: what they took together, without what lay between them.
    """

    operators: int
    kernels: int
    kernel_ms: float


def profile_call(run: Callable[[], object], *, on_gpu: bool) -> StepProfile:
    """Profile one call, which is to have been warmed up; on a card `run` may return before it."""
    events = events_of(run, on_gpu=on_gpu)
    kernels = [event for event in events if is_kernel(event)]
    return StepProfile(
        sum(map(is_operator, events)),
        len(kernels),
        sum(event.time_range.elapsed_us() for event in kernels) / 1e3,
    )


def events_of(run: Callable[[], object], *, on_gpu: bool) -> list[Any]:
    """What the profiler sees of one call."""
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        run()
    return list(seen.events() or ())


def is_operator(event: Any) -> bool:
    """Whether an event of the profiler is an operator that was dispatched."""
    return bool(event.name.startswith(_OWN))


def is_kernel(event: Any) -> bool:
    """Whether an event of the profiler is something that a card ran."""
    # a named part of the program is on the card's line of time as well, around its kernels
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation
