"""The cost table of the paper: Table 7 of He et al., ICCV 2023, ViT-B/16 on one RTX 3090."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

PAPER_MODEL = "vit_base_patch16_224"
PAPER_IMAGE_SIZE = 224
PAPER_BATCH_SIZE = 64
PAPER_SAMPLES = 400
PAPER_SENSITIVITY_S = 5.5  # its text, for so many samples on one GPU, squaring batch gradients


@dataclass(frozen=True)
class PaperRow:
    """One row as printed: latency in ms per image, memory in GB."""

    inference_ms: float
    inference_gb: float
    tuning_gb: float


PAPER_ROWS = MappingProxyType(
    {
        "full": PaperRow(2.8, 1.3, 11.9),
        "prompt-deep": PaperRow(3.8, 1.9, 13.2),
        "lora-16": PaperRow(2.8, 1.3, 8.2),
        "spt-lora-structured": PaperRow(2.8, 1.3, 8.3),
        "spt-lora": PaperRow(2.8, 1.3, 9.8),
    }
)
