"""Tiny tasks whose selections one counts by hand, and folders as runs leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spt_kernels.plan import Plan, allocate
from spt_kernels.sensitivity import Sensitivity

SHAPES = {
    "blocks.0.attn.qkv.weight": (12, 4),
    "blocks.0.attn.qkv.bias": (12,),
    "blocks.1.mlp.fc1.weight": (8, 4),
    "norm.weight": (4,),
}
BACKBONE = 10_000


def scores(high: Mapping[str, list[int]], shapes: Mapping[str, tuple[int, ...]] = SHAPES):
    """Scores of 0.1, but 5 at the flat positions that `high` names."""
    made = {name: torch.full(shape, 0.1) for name, shape in shapes.items()}
    for name, positions in high.items():
        made[name].view(-1)[positions] = 5.0
    return Sensitivity.from_tensors(made, 3)


def plan(high: Mapping[str, list[int]]) -> Plan:
    """A plan of exactly those entries."""
    return allocate(scores(high), sum(map(len, high.values())), structured=None)


# ten each: A has 4 in k, 1 in the bias of q, 5 in fc1; B has 2 in k, 8 in fc1, 2 of A's k, 3 of fc1
A = {
    "blocks.0.attn.qkv.weight": [16, 17, 18, 19],
    "blocks.0.attn.qkv.bias": [0],
    "blocks.1.mlp.fc1.weight": [0, 1, 2, 3, 4],
}
B = {
    "blocks.0.attn.qkv.weight": [18, 19],
    "blocks.1.mlp.fc1.weight": [2, 3, 4, 10, 11, 12, 13, 14],
}


def run(
    folder: Path,
    accuracy: float | None,
    method: str = "spt-lora",
    *,
    seed: int = 0,
    trained: int = 50,
    result: Mapping[str, Any] | None = None,
    images: str = "photos",
    model: str = "vit",
    args: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A folder as a finished run leaves it; `accuracy` `None` leaves it unfinished."""
    folder.mkdir(parents=True)
    own = {
        "budget": None,
        "rank": None,
        "samples": 800,
        "rule": "paper",
        "scale": 1.0,
        "head": None,
    }
    job = {
        "model": {"name": model, "args": args or {}, "weights": None, "pretrained": True},
        "images": {"root": f"/data/{images}", "classes": []},
        "method": {"name": method, **own, **settings},
        "recipe": {"epochs": 10, "batch_size": 64, "seed": seed},
        "form": {},
    }
    (folder / "config.json").write_text(json.dumps({"job": job}))
    if accuracy is not None:
        values = {
            "method": method,
            "test_accuracy": accuracy,
            "val_accuracy": 0.5,
            "trained_parameters": trained,
            "structured_parameters": 30,
            "unstructured_parameters": max(0, trained - 30),
            "backbone_parameters": BACKBONE,
            **(result or {}),
        }
        (folder / "result.json").write_text(json.dumps(values))
    return folder
