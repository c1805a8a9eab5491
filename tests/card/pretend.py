"""A card without one: what PyTorch answers when it is asked for a CUDA device, for a while."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from operator import methodcaller
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_kernels.costs import step_profile
from spt_kernels.layers.autograd import saved_input
from spt_kernels.optim import prepared_step

from .graph import PretendedGraph
from .on_card import CARD, OnCard, Pretence, become, swap

CAPABILITY = (9, 0)
PEAK_BYTES = 1 << 30  # the card's answer to how much was allocated at most


def _set_data(parameter: Any, value: Tensor) -> None:
    if isinstance(value, OnCard):
        become(parameter, value)
    else:
        Tensor.data.__set__(parameter, value)  # type: ignore[attr-defined]


# `parameter.data = ...` gives C++ another tensor, but leaves the class of the Python object
_DATA = property(Tensor.data.__get__, _set_data)  # type: ignore[attr-defined]


class _Generator(torch.Generator):
    """A generator that says where it was made for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.stated = torch.device(device)
        return made

    device = property(lambda self: self.stated)  # type: ignore[assignment]


class _Event:
    """Tells the time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        Pretence.wait()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Autocast(torch.autocast):
    """Autocast of the CPU, whatever it is asked for."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _profile_of_host(activities: Any) -> Any:
    """Asked for a card's events, the profiler would look for a driver at every call, for long."""
    return _PROFILE(activities=[torch.profiler.ProfilerActivity.CPU])


_PROFILE = step_profile.profile


def _without_pinning(loader: Any, *args: Any, **kwargs: Any) -> None:
    _MAKE_LOADER(loader, *args, **{**kwargs, "pin_memory": False})


_MAKE_LOADER = torch.utils.data.DataLoader.__init__


def _inference_mode(mode: bool = True) -> Any:
    return torch.no_grad() if mode else torch.enable_grad()


def _as_arguments(table: Tensor, device: torch.device) -> Tensor:
    """What the arguments of a launch bring to the card: no copy that a graph would see."""
    return OnCard(table.clone())


def _grouped(group: Any) -> Any:
    """Groups of tensors by device and dtype, which C++ takes for the CPU's, as Python sees them."""

    def grouped(lists: Any, *args: Any, **kwargs: Any) -> Any:
        found = group(lists, *args, **kwargs).items()
        return {(made[0][0][0].device, dtype): made for (_, dtype), made in found}

    return grouped


@contextlib.contextmanager
def _on(device: Any) -> Iterator[None]:
    yield


def _synchronize(*_: Any) -> None:
    Pretence.wait()


class _Stream:
    """All streams are one."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        Pretence.wait()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _is_another_mode_on() -> bool:
    return torch._C._len_torch_dispatch_stack() > 1


@contextlib.contextmanager
def pretended_card() -> Iterator[type[Pretence]]:
    """Within it there is one CUDA device; gives where the waits for it are counted."""
    triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
    from spt_kernels.kernels import address_table

    if torch.cuda.is_available():
        pytest.skip("there is a real card")
    properties = SimpleNamespace(name="a pretended card", multi_processor_count=132, major=9)
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": _synchronize,
        "Event": _Event,
        "device": _on,
        "device_of": _on,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: PEAK_BYTES,
        "memory_allocated": lambda *_: 1 << 29,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: CAPABILITY,
        "is_current_stream_capturing": lambda: Pretence.recorder is not None,
        "CUDAGraph": PretendedGraph,
        "Stream": _Stream,
        "stream": _on,
        "current_stream": _Stream,
        "get_sync_debug_mode": lambda: Pretence.refused,
        "set_sync_debug_mode": lambda mode: setattr(Pretence, "refused", mode),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda *_: True,
    }
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, where there is no driver
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        # a parameter that moves stays the same object, as it does on its way to a real card
        patch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
        patch.setattr(torch.utils, "swap_tensors", swap)
        patch.setattr(torch.nn.Parameter, "data", _DATA, raising=False)
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(step_profile, "profile", _profile_of_host)
        # a wrapper made in inference mode could be no view of one made outside
        patch.setattr(torch, "inference_mode", _inference_mode)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.utils.data.DataLoader, "__init__", _without_pinning)
        for user in (torch.optim.Optimizer, torch.nn.utils.clip_grad):
            group = user._group_tensors_by_device_and_dtype
            grouped = _grouped(group)
            is_class = isinstance(user, type)
            patch.setattr(user, group.__name__, staticmethod(grouped) if is_class else grouped)
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self.clone())
        patch.setattr(Tensor, "cuda", lambda self, *_, **__: self.to(CARD))
        patch.setattr(saved_input, "_INSPECTED", (*saved_input._INSPECTED, OnCard))
        if not triton.knobs.runtime.interpret:  # no kernel of ours can run but as an op
            patch.setattr(address_table, "upload_as_arguments", _as_arguments)
            patch.setattr(address_table, "load_for_capture", lambda device: None)
        else:
            patch.setattr(prepared_step, "PLAIN", {*prepared_step.PLAIN, OnCard})
            patch.setattr(prepared_step, "address_of", methodcaller("data_ptr"))
            patch.setattr(prepared_step, "is_listened_to", _is_another_mode_on)
        Pretence.waits, Pretence.refused, Pretence.recorder = 0, 0, None
        # `torch.tensor(..., device="cuda")` then shows the way to the device as a call
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Pretence():
                yield Pretence
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
