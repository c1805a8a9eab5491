"""How far approximate gradients are from exact ones, block by block of the evidence's small ViT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence.contender import Run
from bench.evidence.run import job_of
from bench.evidence.setting import VIT
from bench.evidence.tasks import write_tasks
from bench.evidence.weights import weights_file
from spt_kernels.approximation import approximate, parse_approximation
from spt_kernels.benchmarks import folder_tasks
from spt_kernels.costs.machine import commit, describe
from spt_kernels.files.atomic import write_atomically
from spt_kernels.finetuning.progress import Silent
from spt_kernels.finetuning.run.setting import open_setting

from .ways import EXACT, GRADIENTS, WAYS

TASK, IMAGES = "four-classes", 256

# ReGELU2's published levels of the derivative, and where one gives way to the next
_REGELU2 = ((0.0, -0.0492, 1.0487, 1.0), (-3.186, -0.0012, 3.191))


def measure(data: Path, work: Path) -> None:
    """Write, for each way and block, the error of the block's gradient relative to its norm."""
    torch.set_num_threads(1)
    write_tasks(data, work / "tasks")
    weights = weights_file(VIT.model.weights or "", data, work / "weights")
    (task,) = folder_tasks(work / "tasks", (TASK,))
    setting = open_setting(job_of(VIT, Run(TASK, "full", 0), task, weights), "cpu")
    batches = setting.training_batches(Silent())
    model: Any = setting.base.model.eval()
    taken = []
    for images, labels in batches:
        taken.append((images, labels))
        if sum(len(some) for some, _ in taken) >= IMAGES:
            break
    inputs: list[Tensor] = []
    hooks = [
        block.mlp.act.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        for block in model.blocks
    ]
    exact = _gradients(model, taken)
    for hook in hooks:
        hook.remove()
    errors: dict[str, list[float]] = {}
    for way, words in WAYS.items():
        if way != EXACT:
            approximate(model, **parse_approximation(words))
            found = _gradients(model, taken)
            errors[way] = [
                float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
            ]
    depth = len(model.blocks)
    by_block = [torch.cat([x.flatten() for x in inputs[block::depth]]) for block in range(depth)]
    place = describe(torch.device("cpu"))
    told: dict[str, Any] = {
        "task": TASK,
        "images": sum(len(some) for some, _ in taken),
        "gradients": errors,
        "derivatives": {
            "GELU 8 bits": [_slope_error(x, _slopes(x, 8)) for x in by_block],
            "GELU 2 bits": [_slope_error(x, _slopes(x, 2)) for x in by_block],
            "ReGELU2's levels": [_slope_error(x, _regelu2(x)) for x in by_block],
        },
        "machine": place.processor,
        "versions": dict(place.versions),
        "commit": commit(),
    }
    write_atomically(GRADIENTS, (json.dumps(told, indent=1) + "\n").encode())


def _gradients(model: Any, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The mean loss's gradient of all parameters of each block, as one vector."""
    model.requires_grad_(True).zero_grad()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels, reduction="sum")
        (loss / IMAGES).backward()
    return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in model.blocks]


def _slopes(x: Tensor, bits: int) -> Tensor:
    from spt_kernels.ops.encode_derivative import decode_derivative, encode_derivative

    _, codes = encode_derivative(x, "gelu", bits)
    return decode_derivative(torch.ones_like(x), codes, "gelu", bits)


def _regelu2(x: Tensor) -> Tensor:
    levels, bounds = (torch.tensor(values) for values in _REGELU2)
    return levels[torch.bucketize(x, bounds)]


def _slope_error(x: Tensor, slopes: Tensor) -> float:
    """Root mean square error of a derivative, relative to the root mean square of the exact one."""
    exact = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    return float((slopes - exact).norm() / exact.norm())
