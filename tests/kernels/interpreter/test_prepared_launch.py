"""Launches that are prepared once for all layers that are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import prepared_launch
from spt_kernels.kernels.prepared_launch import PreparedLaunches, addressed, pointer_to
from spt_kernels.kernels.rebuild_input import layer_norm_kernel, rebuild_layer_norm


def test_a_launch_is_found_by_its_key_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_launch, "_MOST_LAUNCHES", 3)
    launches, x = PreparedLaunches(), torch.zeros(64)
    assert launches.get((0,)) is None
    for n in range(10):
        made = launches.prepare((n,), layer_norm_kernel, 1, (x,), (4, n), (), (16,))
        assert launches.get((n,)) is made
        assert made[1:] == ((4, n), (16,))
        assert sum(launches.get((k,)) is not None for k in range(10)) <= 3


def test_alignment_is_told_of_each_tensor() -> None:
    fits, odd = torch.zeros(8), torch.zeros(9)[1:]
    patterns = [(fits, fits), (fits, odd), (odd, fits), (odd, odd)]
    assert [addressed(*pattern)[1] for pattern in patterns] == [0, 1, 2, 3]


def test_an_interpreter_takes_tensors_themselves() -> None:
    x, y = torch.zeros(8), torch.zeros(4)
    assert addressed(x, y)[0] == (x, y)
    assert pointer_to(x) is x


def test_layers_alike_share_a_launch_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from spt_kernels.kernels import rebuild_input

    made = []

    def prepare(kernel: object, n_programs: int, *arguments: object, **options: int) -> object:
        made.append(arguments)
        return lambda *_: None

    monkeypatch.setattr(prepared_launch, "prepared_launch", prepare)
    monkeypatch.setattr(rebuild_input, "_launches", PreparedLaunches())

    def rebuild(
        shape: tuple[int, int] = (4, 16), dtype: torch.dtype = torch.float32, odd: str = ""
    ) -> int:
        """How many launches have been prepared after it."""

        def tensor(name: str, *size: int) -> Tensor:
            n = size[0] * size[-1] if len(size) > 1 else size[0]
            return torch.zeros(n + 1, dtype=dtype)[int(name in odd) :][:n].view(size)

        rows, columns = shape
        statistics = torch.zeros(rows), torch.ones(rows)
        affine = tensor("weight", columns), tensor("bias", columns)
        rebuild_layer_norm(tensor("input", *shape), *statistics, *affine, 1, torch.bfloat16)
        return len(made)

    assert rebuild() == 1
    assert rebuild() == 1
    others = [
        {"shape": (5, 16)},
        {"shape": (4, 17)},
        {"dtype": torch.bfloat16},
        *({"odd": odd} for odd in ("input", "weight", "bias", "weight bias")),
    ]
    for n, other in enumerate(others, 2):
        assert rebuild(**other) == n  # type: ignore[arg-type]
        assert rebuild(**other) == n  # type: ignore[arg-type]
