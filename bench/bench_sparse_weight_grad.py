"""The gradient of selected weight entries beside the dense weight gradient that it replaces.

The floor: `grad_output` and `input` are read once, `tokens · (out + in)` elements, and an entry
takes a multiplication and an addition per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_kernels import native, ops
from spt_kernels.ops.rebuild_input import rebuild_gelu, rebuild_layer_norm
from spt_kernels.ops.sparse_weight_grad import SparsePattern, launch
from spt_kernels.sensitivity.synthetic import COLUMN, ENTRY, ROW

from .contest import hold

OURS = "spt.ops.sparse_weight_grad"
DENSE = "dense gradient"
DENSE_GATHERED = "dense gradient, then gather"
IMAGE = 197  # tokens of a ViT with patches of 16² on 224²
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def mask(kind: str, n_out: int, n_in: int, density: float) -> Tensor:
    """Sorted positions, as many as the density says.

    `uniform` is the hardest: it touches every row and column. `measured` takes the largest scores
    where these differ between rows, columns and entries as measured sensitivities do.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform":
        scores = torch.rand(n_out, n_in, generator=generator)
    else:
        scores = ENTRY * torch.randn(n_out, n_in, generator=generator)
        scores += ROW * torch.randn(n_out, 1, generator=generator)
        scores += COLUMN * torch.randn(1, n_in, generator=generator)
    chosen = scores.flatten().topk(max(1, round(density * n_out * n_in))).indices
    return chosen.sort().values.int()


def by_gathering(grad_output: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """As one would write it: columns side by side, multiplied and summed, in chunks of entries."""
    rows, columns = (index // x.shape[1]).long(), (index % x.shape[1]).long()
    chunk = max(1, 2**24 // len(x))
    parts = zip(rows.split(chunk), columns.split(chunk), strict=True)
    return torch.cat([(grad_output[:, r] * x[:, c]).sum(0) for r, c in parts])


def sampled_csr(index: Tensor, n_out: int, n_in: int) -> Tensor:
    begin = torch.searchsorted(index.long(), torch.arange(n_out + 1, device=index.device) * n_in)
    values = torch.zeros(len(index), device=index.device)
    return torch.sparse_csr_tensor(begin, index.long() % n_in, values, (n_out, n_in))


def compete(
    benchmark: Any,
    device: torch.device,
    *,
    shape: tuple[int, int],
    tokens: int,
    density: float,
    kind: str = "uniform",
    dtype: torch.dtype = torch.float32,
    peers: bool = False,
    rounds: int = 5,
    targets: dict[str, float] | None = None,
    growth: tuple[str, float] | None = None,
) -> None:
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(tokens, n_out, generator=generator).to(device, dtype)
    x = torch.randn(tokens, n_in, generator=generator).to(device, dtype)
    index = mask(kind, n_out, n_in, density).to(device)
    pattern = SparsePattern.build(index, n_out, n_in)  # once, as a layer does
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: ops.sparse_weight_grad(grad_output, x, pattern),
        DENSE: lambda: grad_output.T @ x,
        DENSE_GATHERED: lambda: (grad_output.T @ x).flatten()[index],
    }
    if dtype != torch.float32 and device.type == "cpu":  # which multiplies no 16-bit numbers
        del contestants[DENSE_GATHERED]
        contestants["dense gradient, cast to fp32"] = lambda: grad_output.float().T @ x.float()
        if tokens > 8 * IMAGE:
            del contestants[DENSE]  # five times as long, seconds
    if peers:
        csr = sampled_csr(index, n_out, n_in)
        contestants["torch.sparse.sampled_addmm"] = lambda: torch.sparse.sampled_addmm(
            csr, grad_output.T, x, beta=0.0
        )
        contestants["columns gathered, in chunks"] = lambda: by_gathering(grad_output, x, index)
    name = str(dtype).removeprefix("torch.")
    hold(
        benchmark,
        f"sparse weight gradient: {n_out}×{n_in}, {tokens} tokens, {name}, {density:.1%} {kind}",
        contestants,
        rounds=rounds,
        flops=2 * tokens * len(index),
        bytes_moved=tokens * (n_out + n_in) * dtype.itemsize,
        targets={name: limit for name, limit in (targets or {}).items() if name in contestants},
        growth=growth,
    )


def limits(density: float) -> dict[str, float]:
    """What ours over the dense gradient is to be at most."""
    limit = next(
        limit
        for upto, limit in ((0.005, 0.25), (0.02, 0.6), (0.05, 1.0), (1.0, 1.05))
        if density <= upto
    )
    return {DENSE: limit, "dense gradient, cast to fp32": limit}


@DTYPES
@pytest.mark.parametrize("density", [0.005, 0.02, 0.05, 0.5])
def test_densities(
    benchmark: Any, device: torch.device, density: float, dtype: torch.dtype
) -> None:
    compete(
        benchmark,
        device,
        shape=(3072, 768),
        tokens=64 * IMAGE,
        density=density,
        dtype=dtype,
        rounds=3,
        targets=limits(density),
    )


@pytest.mark.parametrize("kind", ["uniform", "measured"])
@pytest.mark.parametrize("shape", [(2304, 768), (768, 3072)], ids=["2304x768", "768x3072"])
def test_masks_and_peers(
    benchmark: Any, device: torch.device, shape: tuple[int, int], kind: str
) -> None:
    compete(
        benchmark,
        device,
        shape=shape,
        tokens=8 * IMAGE,
        density=0.005,
        kind=kind,
        peers=True,
        rounds=3,
        targets=limits(0.005)
        | {"torch.sparse.sampled_addmm": 1.0, "columns gathered, in chunks": 1.0},
    )


@pytest.mark.parametrize("images", [8, 64])
@pytest.mark.parametrize("after", ["gelu", "layer_norm"])
def test_after_an_activation(benchmark: Any, after: str, images: int) -> None:
    """On a CPU: the activation done while its columns are packed, beside one that is made first."""
    n_out, n_in = (768, 3072) if after == "gelu" else (2304, 768)
    tokens = images * IMAGE
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(tokens, n_out, generator=generator)
    source = torch.randn(tokens, n_in, generator=generator)
    pattern = SparsePattern.build(mask("measured", n_out, n_in, 0.005), n_out, n_in)
    plan = pattern.native_plan()
    if plan is None:
        pytest.skip(native.why_unavailable())
    y, *statistics = torch.native_layer_norm(source, (n_in,), None, None, 1e-6)
    del y
    mean, rstd = (each.flatten() for each in statistics)
    addresses = (mean.data_ptr(), rstd.data_ptr(), 0, 0)
    if after == "gelu":
        activation = native.Activation(native.GELU, 0)
    else:
        activation = native.Activation(native.LAYER_NORM, 0, *addresses)

    def made_first() -> Tensor:
        if after == "gelu":
            x = rebuild_gelu(source, "none", source.dtype)
        else:
            x = rebuild_layer_norm(source, mean, rstd, None, None, 1, source.dtype)
        return launch(grad_output, x, pattern)

    hold(
        benchmark,
        f"sparse weight gradient after a {after}: {n_out}×{n_in}, {tokens} tokens, 0.5%",
        {
            "packed": lambda: plan.run(grad_output, source, tokens, (n_out, n_in), activation),
            "the input made first": made_first,
        },
        targets={"the input made first": 1.0},
    )


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(192, 192), (768, 768), (768, 3072)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_never_slower_than_the_dense_gradient(
    benchmark: Any, device: torch.device, shape: tuple[int, int], density: float
) -> None:
    compete(
        benchmark, device, shape=shape, tokens=8 * IMAGE, density=density, targets=limits(density)
    )


@pytest.mark.parametrize("density", [0.001, 0.004, 0.016, 0.064])
def test_growth_with_entries(benchmark: Any, device: torch.device, density: float) -> None:
    compete(
        benchmark,
        device,
        shape=(1536, 768),
        tokens=8 * IMAGE,
        density=density,
        growth=("entries", round(density * 1536 * 768)),
    )


@pytest.mark.parametrize("images", [1, 4, 16])
def test_growth_with_tokens(benchmark: Any, device: torch.device, images: int) -> None:
    tokens = images * IMAGE
    compete(
        benchmark,
        device,
        shape=(1536, 768),
        tokens=tokens,
        density=0.01,
        growth=("tokens", tokens),
    )


@pytest.mark.parametrize("width", [192, 384, 768, 1536])
def test_growth_with_width(benchmark: Any, device: torch.device, width: int) -> None:
    compete(
        benchmark,
        device,
        shape=(width, width),
        tokens=8 * IMAGE,
        density=0.01,
        growth=("width", width),
    )
