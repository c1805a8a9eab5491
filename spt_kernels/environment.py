"""What this installation and machine offer: `backends()`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Backends:
    """Which implementations of the ops can run here; `None` means absent.

    Attributes:
        native: `"available"` when the compiled C++ module for CPU tensors is there.
        triton: the version of Triton, which the kernels for CUDA tensors need.
        cuda: the name of the first CUDA device.
        rebuilding: `"available"` where this torch lets a layer make its input again of what a GELU
            or LayerNorm before it keeps; elsewhere it keeps that itself, and a step takes more
            memory.
        missing: for each absent backend, one sentence that says why and what to do.
    """

    native: str | None
    triton: str | None
    cuda: str | None
    rebuilding: str | None
    missing: dict[str, str]

    def __str__(self) -> str:
        rows = [("reference", "available")]
        for name in ("native", "triton", "cuda", "rebuilding"):
            present = getattr(self, name)
            rows.append((name, present if present else f"absent: {self.missing[name]}"))
        return "\n".join(f"{name:<10} {state}" for name, state in rows)


def backends() -> Backends:
    """Say which backends are present. On a CPU, `native` comes before `reference`."""
    import torch

    from . import native
    from .layers.autograd.graph_nodes import tells_what_is_kept

    missing = {}
    if not native.available():
        missing["native"] = native.why_unavailable()
    triton = None
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "install it with `pip install triton` (CUDA ops need it)"
    else:
        triton = _version_of_triton()
    cuda = None
    if not torch.cuda.is_available():
        missing["cuda"] = "torch sees no CUDA device"
    else:
        cuda = torch.cuda.get_device_name(0)
    is_told = tells_what_is_kept()
    if not is_told:
        missing["rebuilding"] = (
            f"torch {torch.__version__} does not tell a layer what is kept before it (2.11 does): "
            "steps take more memory"
        )
    states = ("available" if native.available() else None, triton, cuda)
    return Backends(*states, "available" if is_told else None, missing)


def _version_of_triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # pytorch-triton, triton-windows, ...
        return str(importlib.import_module("triton").__version__)
