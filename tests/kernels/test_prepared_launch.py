"""Launches past what Triton does for listeners: the same calls of the same launcher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.compiler.compiler import CompiledKernel

from spt_kernels.kernels import low_rank, low_rank_grad, prepared_launch
from spt_kernels.kernels.low_rank_parts import Dropped
from spt_kernels.kernels.prepared_launch import PreparedLaunches, addressed, pointer_to
from spt_kernels.kernels.take import take_entries

STREAM = 900


class Compiled(CompiledKernel):
    """A kernel that is loaded, whose launcher notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.module, self.function, self.packed_metadata = 1, 17, (4, 1, 0)
        self.name, self.src = "kernel", SimpleNamespace(fn=SimpleNamespace(launch_metadata=None))
        self._run = self.note

    def __del__(self) -> None:
        """Nothing is to be unloaded."""

    def note(self, *given: Any) -> None:
        before, after = given[7:9]
        for hook in (before, after):
            if hook is not None:
                hook(given[6])
        self.calls.append((*given[:6], *given[9:]))


class Driver:
    """Of a card on which another stream may become the current one."""

    def __init__(self) -> None:
        self.stream = STREAM
        self.get_current_device = lambda: 3
        self.get_current_stream = lambda device: self.stream + device


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return driver


@pytest.fixture
def compiled(driver: Driver) -> Compiled:
    return Compiled()


def test_it_is_the_launch_that_triton_makes(compiled: Compiled) -> None:
    compiled[(5, 1, 1)](10, 20, 0.5)
    prepared_launch.without_detours(compiled)(5, 10, 20, 0.5)
    theirs, ours = compiled.calls
    assert ours == theirs == (5, 1, 1, STREAM + 3, 17, (4, 1, 0), 10, 20, 0.5)


@pytest.mark.parametrize("end", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_is_told(compiled: Compiled, end: str) -> None:
    told: list[str] = []
    launch = prepared_launch.without_detours(compiled)
    hooks = getattr(triton.knobs.runtime, end)

    def hook(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    launch(5, 10)
    hooks.add(hook)
    try:
        launch(6, 10)
    finally:
        hooks.remove(hook)
    launch(7, 10)
    assert told == ["kernel"]
    assert [call[0] for call in compiled.calls] == [5, 6, 7]
    assert len({call[1:] for call in compiled.calls}) == 1


def test_a_launch_is_on_the_stream_of_its_time(compiled: Compiled, driver: Driver) -> None:
    """As in the capture of a CUDA graph."""
    launch = prepared_launch.without_detours(compiled)
    launch(5, 10)
    driver.stream = 2 * STREAM
    launch(5, 10)
    assert [call[3] for call in compiled.calls] == [STREAM + 3, 2 * STREAM + 3]


@pytest.mark.parametrize("end", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_an_older_kind(
    compiled: Compiled, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    launch = prepared_launch.without_detours(compiled)
    monkeypatch.setattr(triton.knobs.runtime, end, told.append)
    launch(5, 10)
    assert len(told) == 1
    monkeypatch.setattr(triton.knobs.runtime, end, None)
    launch(5, 10)
    assert len(told) == 1
    assert len(compiled.calls) == 2


def test_tensors_go_as_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor Triton would ask the driver, for each launch."""
    launched: list[tuple[Any, ...]] = []
    typed: list[tuple[Any, ...]] = []

    def prepare(kernel: Any, n_programs: int, *arguments: Any, **options: int) -> Any:
        typed.append(arguments)
        return lambda *given: launched.append(given)

    monkeypatch.setattr(prepared_launch, "prepared_launch", prepare)
    monkeypatch.setattr("spt_kernels.kernels.take._launches", PreparedLaunches())
    matrix, index = torch.randn(6, 8), torch.tensor([1, 5], dtype=torch.int32)
    output = take_entries(matrix, index)
    pointers = [tensor.data_ptr() for tensor in (output, matrix, index)]
    ((*given, nnz, numel, _),) = launched
    assert given == pointers
    assert (nnz, numel) == (2, 48)
    ((*tensors, _, _, _),) = typed  # whose dtypes the kernel is compiled for
    assert all(map(torch.is_tensor, tensors))


def test_addresses_and_alignment() -> None:
    fits, odd = torch.zeros(8), torch.zeros(9)[1:]
    for pattern, bits in (((fits, fits), 0), ((fits, odd), 1), ((odd, fits), 2), ((odd, odd), 3)):
        pointers, aligned = addressed(*pattern)
        assert pointers == [tensor.data_ptr() for tensor in pattern]
        assert aligned == bits
    assert pointer_to(odd) == odd.data_ptr()
    assert addressed(torch.empty(0)) == ([0], 0)
    assert addressed() == ([], 0)


def test_tensors_of_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would read what is not there, and end the process's use of the card."""
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    monkeypatch.setattr(prepared_launch, "_number_of_device", lambda tensor: int(tensor is there))
    with pytest.raises(ValueError, match="must lie on one device, got cpu, meta"):
        addressed(here, there)


@pytest.mark.gpu
def test_a_factor_that_was_left_on_the_host_is_refused() -> None:
    x = torch.randn(4, 8, device="cuda")
    with pytest.raises(ValueError, match="must lie on one device, got cuda:0, cpu, cuda:0"):
        low_rank.low_rank_down(x, torch.randn(8, 2), (1, 8, 0, 0), 1.0, NOTHING)
    torch.cuda.synchronize()


def odd(tensor: Tensor) -> Tensor:
    """The same in memory that is no multiple of 16 bytes."""
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that launches are prepared of; none is launched."""
    names: list[str] = []

    def prepare(kernel: Any, n_programs: int, *arguments: Any, **options: int) -> Any:
        names.append(kernel.fn.__name__)
        return lambda *_: None

    monkeypatch.setattr(prepared_launch, "prepared_launch", prepare)
    monkeypatch.setattr(low_rank, "_launches", PreparedLaunches())
    monkeypatch.setattr(low_rank_grad, "_launches", PreparedLaunches())
    monkeypatch.setattr(low_rank_grad, "capability_of", lambda device: 90)
    return names


NOTHING, SOME = Dropped((0, 0, 0)), Dropped((1, 2, 3))
HALF = torch.bfloat16


def test_what_an_update_is_prepared_anew_for(prepared: list[str]) -> None:
    base, inner, factor, bias = (torch.zeros(*size) for size in ((4, 8), (4, 2), (8, 2), (8,)))
    given: dict[str, Any] = {"base": base, "output": base.clone(), "inner": inner, "factor": factor}
    given |= {"span": (1, 8, 0, 0), "scale": 1.0, "dropped": NOTHING, "bias": bias}
    others: list[dict[str, Any]] = [
        *({name: odd(given[name])} for name in ("base", "output", "inner", "factor", "bias")),
        *({name: given[name].to(HALF)} for name in ("output", "factor", "bias")),
        {"base": base.to(HALF), "inner": inner.to(HALF)},
        {"bias": None},
        {"dropped": SOME},
        {"dropped": Dropped((0, 0, 3), torch.zeros(2, dtype=torch.int64))},
        {"span": (1, 4, 0, 0), "factor": factor[:4]},
        {"factor": torch.zeros(2, 8), "is_across": True},
        {"base": torch.zeros(5, 8), "output": torch.zeros(5, 8), "inner": torch.zeros(5, 2)},
    ]
    for n, other in enumerate([{}, *others], 1):
        for _ in range(2):
            low_rank.low_rank_up(**given | other)
            assert len(prepared) == n, other
    low_rank.low_rank_up(**given | {"scale": 2.0, "base": torch.zeros(2, 2, 8)})
    assert len(prepared) == len(others) + 1, "of another number, or in other dimensions"


def test_what_a_gradient_is_prepared_anew_for(prepared: list[str]) -> None:
    x, inner, mean, affine = (torch.zeros(*size) for size in ((4, 8), (4, 2), (4,), (8,)))
    given: dict[str, Any] = {"input": x, "grad_inner": inner, "dropped": NOTHING}
    given |= {"activation": "layer_norm", "norm": (mean, mean.clone(), affine, affine.clone())}
    norms = [
        tuple(each.to(HALF) if n == k else each for k, each in enumerate(given["norm"]))
        for n in range(4)
    ]
    others: list[dict[str, Any]] = [
        *({"norm": norm} for norm in norms),
        *({"norm": (*given["norm"][:2], *some)} for some in ((None, affine), (affine, None))),
        {"norm": (mean, odd(mean), affine, affine)},
        {"activation": "none", "norm": (None,) * 4},
        {"activation": "gelu", "norm": (None,) * 4},
        {"input": odd(x)},
        {"grad_inner": inner.to(HALF)},
        {"dropped": SOME},
    ]
    for n, other in enumerate([{}, *others], 1):
        for _ in range(2):
            low_rank_grad.low_rank_grad(**given | other)
            assert len(prepared) == n, other
