"""Every block of Python in docs/DISTRIBUTED.md runs, in the order in which it is read."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import spt_kernels as spt
from spt_kernels.distributed import Processes
from tests.models import tiny_batch, tiny_vit

SIZES = (2,)
PAGE = Path(__file__).parents[2] / "docs" / "DISTRIBUTED.md"


def check_blocks_run(place: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    folder = place / "documentation"
    folder.mkdir(exist_ok=True)
    names: dict[str, Any] = {
        "torch": torch,
        "dist": dist,
        "F": F,
        "spt": spt,
        "copy": copy,
        "DistributedDataParallel": DistributedDataParallel,
        "model": tiny_vit(depth=1),
        "dataset": TensorDataset(*tiny_batch(16)),
        "folder": folder,
    }
    for block in blocks:
        exec(block, names)
    written = {"ddp.safetensors", "fsdp.safetensors", "checkpoint"}
    dist.barrier()
    assert {path.name for path in folder.iterdir()} == written
    loaded = spt.load_delta(tiny_vit(depth=1), folder / "fsdp.safetensors")
    assert loaded.spt_tuning.plan == names["model"].spt_tuning.plan
    assert names["same_plan"] == names["plan"]
    selected = Processes.of(dist.group.WORLD).gather(sum(map(len, names["positions"])))
    assert sum(selected) == 500
