"""C++ LayerNorm from kept statistics against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels import native
from spt_kernels.reference.rebuild_input import rebuild_layer_norm

SHAPES = [(1, 1), (3, 7), (40, 4099), (0, 8)]


def case(n_rows: int, n_columns: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n_rows + n_columns)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return (
        *(2 * draw(n_rows, n_columns) + 1, draw(n_rows, 1), draw(n_rows, 1).abs()),
        *(draw(n_columns), draw(n_columns)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_the_reference(
    shape: tuple[int, int],
    affine: str,
    dtype: torch.dtype,
    code_path: str,
    restored_threads: None,
) -> None:
    x, mean, rstd, weight, bias = case(*shape)
    some_weight = weight if affine in ("both", "weight") else None
    some_bias = bias if affine in ("both", "bias") else None
    expected = rebuild_layer_norm(x, mean, rstd, some_weight, some_bias, 1, dtype)
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        output = torch.full(shape, torch.nan, dtype=dtype)
        native.rebuild_layer_norm(x, mean, rstd, some_weight, some_bias, output)
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("name", "place", "tensor"),
    [
        ("input", 0, torch.zeros(4, 3).t()),
        ("input", 0, torch.zeros(3, 4, dtype=torch.float64)),
        ("rstd", 2, torch.zeros(2)),
        ("mean", 1, torch.zeros(3, dtype=torch.bfloat16)),
        ("weight", 3, torch.zeros(5)),
        ("bias", 4, torch.zeros(4, dtype=torch.float16)),
        ("output", 5, torch.zeros(11)),
        ("output", 5, torch.zeros(3, 4, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_refused(name: str, place: int, tensor: Tensor) -> None:
    arguments: list[Tensor | None] = [*case(3, 4), torch.zeros(3, 4)]
    arguments[place] = tensor
    with pytest.raises(ValueError, match=f"^{name} must"):
        native.rebuild_layer_norm(*arguments)  # type: ignore[arg-type]
