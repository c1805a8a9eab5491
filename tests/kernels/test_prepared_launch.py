"""Launches past what Triton does for listeners: the same calls of the same launcher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.compiler.compiler import CompiledKernel

from spt_kernels.kernels import prepared_launch
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


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    driver = SimpleNamespace(
        get_current_device=lambda: 3, get_current_stream=lambda device: STREAM + device
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
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


@pytest.mark.parametrize("hooks", [None, print], ids=["none", "a call"])
def test_hooks_of_an_older_kind(
    compiled: Compiled, hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hooks)
    prepared_launch.without_detours(compiled)(5, 10)
    assert len(compiled.calls) == 1


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
