"""Accounted memory of a ViT-B/16's training step with exact and with approximate gradients."""

from __future__ import annotations

import json
from typing import Any

import timm

from spt_kernels import __version__
from spt_kernels.approximation import approximate, parse_approximation
from spt_kernels.costs.machine import commit
from spt_kernels.files.atomic import write_atomically
from spt_kernels.memory import estimate_memory
from spt_kernels.memory.estimate import DTYPES

from .ways import MEMORY, WAYS

MODEL, BATCH, METHODS = "vit_base_patch16_224", 64, ("spt-lora", "spt-unstructured", "lora-16")


def account() -> None:
    """Write peaks and activations of every method, dtype and way, in bytes."""
    model = timm.create_model(MODEL, num_classes=100)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for dtype in DTYPES:
            for way, words in WAYS.items():
                approximate(model, **parse_approximation(words))
                found = estimate_memory(model, (BATCH, 3, 224, 224), method=method, dtype=dtype)
                activations = found.by_category["activations"]
                rows.append(
                    {
                        **{"method": method, "dtype": dtype, "way": way},
                        **{"peak_bytes": found.peak_bytes, "activations": activations},
                    }
                )
    told = {
        **{"model": MODEL, "batch": BATCH, "rows": rows},
        **{"spt_kernels": __version__, "timm": timm.__version__, "commit": commit()},
    }
    write_atomically(MEMORY, (json.dumps(told, indent=1) + "\n").encode())
