"""What one H100 took: the figures that the models of cards are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spt_kernels.gradient_ways.gradient_cost import Way

SOURCE = (
    "one NVIDIA H100 80GB HBM3, driver 580, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-28, "
    "commit f7dcc7d"
)


@dataclass(frozen=True)
class MeasuredWays:
    """Microseconds of kernels of every way to one sparse weight gradient of 12,608 tokens.

    Attributes:
        rows: of the weight.
        columns: of the weight.
        density: share of its entries that is wanted.
        in_a_quarter: whether they lie in a quarter of its rows and columns, or anywhere.
        is_fp32: rather than bf16.
        us: by way.
    """

    rows: int
    columns: int
    density: float
    in_a_quarter: bool
    is_fp32: bool
    us: Mapping[Way, float]

    def __str__(self) -> str:
        where = " in a quarter" if self.in_a_quarter else ""
        dtype = "fp32" if self.is_fp32 else "bf16"
        return f"{self.rows}×{self.columns}, {dtype}, {self.density:.1%}{where}"

    @property
    def fastest(self) -> Way:
        """The way that took the least."""
        return min(self.us, key=lambda way: self.us[way])


def _ways(
    rows: int, columns: int, density: float, dense: float, vectors: float, tiles: float,
    *, quarter: bool = False, fp32: bool = False,
) -> MeasuredWays:  # fmt: skip
    us = {Way.DENSE: dense, Way.VECTORS: vectors, Way.TILES: tiles}
    return MeasuredWays(rows, columns, density, quarter, fp32, MappingProxyType(us))


H100_WAYS = (
    _ways(3072, 768, 0.005, 93, 315, 62),
    _ways(3072, 768, 0.02, 93, 1174, 133),
    _ways(3072, 768, 0.02, 94, 876, 76, quarter=True),
    _ways(768, 768, 0.005, 39, 121, 31),
    _ways(768, 768, 0.02, 39, 304, 34),
    _ways(3072, 768, 0.005, 1182, 510, 713, fp32=True),
    _ways(3072, 768, 0.02, 1180, 1348, 1805, fp32=True),
    _ways(3072, 768, 0.02, 1171, 1048, 219, quarter=True, fp32=True),
    _ways(768, 768, 0.005, 319, 136, 197, fp32=True),
    _ways(768, 768, 0.02, 320, 443, 460, fp32=True),
)


@dataclass(frozen=True)
class MeasuredKernels:
    """Microseconds of the kernels of one op, by the name it has in `roofline_gpu.kernels`.

    Attributes:
        name: of the op.
        us: what its kernels took.
        images: of 197 tokens, where it is an op on tokens.
    """

    name: str
    us: float
    images: int = 64


H100_KERNELS = (
    MeasuredKernels("squared_grad, fc1 3072×768, bf16", 290, images=32),
    MeasuredKernels("rebuild_input, GELU of 3072, bf16", 58),  # twelve of a step took 0.7 ms
)


@dataclass(frozen=True)
class MeasuredStep:
    """Milliseconds of the kernels of a training step of ViT-B/16 at batch 64."""

    method: str
    dtype: str
    ms: float


H100_STEPS = (
    MeasuredStep("full", "bf16-autocast", 28.6),
    MeasuredStep("peft-lora-16", "bf16-autocast", 23.6),
    MeasuredStep("spt-unstructured", "bf16-autocast", 27.7),
    MeasuredStep("full", "fp32", 167.8),
    MeasuredStep("peft-lora-16", "fp32", 125.8),
    MeasuredStep("spt-unstructured", "fp32", 139.7),
)
