"""The approximations that are compared, and where what came of them is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

RESULTS = Path(__file__).parents[1] / "results" / "approximation"
GRADIENTS, MEMORY = RESULTS / "gradients.json", RESULTS / "memory.json"
ACCURACY = RESULTS / "accuracy.jsonl"

EXACT = "exact"
# as tables call them -> as `--approximate` has them
WAYS: Mapping[str, str | None] = MappingProxyType(
    {
        EXACT: None,
        "GELU 8 bits": "gelu-8bit",
        "GELU 2 bits": "gelu-2bit",
        "LayerNorm": "layer-norm-from-output",
        "GELU 2 bits, LayerNorm": "gelu-2bit,layer-norm-from-output",
    }
)
