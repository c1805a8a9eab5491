"""A step of SPT-Adapter beside the same Adapters as anybody would write them, in plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spt_kernels.costs import CostSetting
from spt_kernels.costs.measure import make_step, tune_for_costs
from spt_kernels.layers import AdapterLinear

from .contest import hold

METHOD = "spt-adapter-structured"  # without entries of matrices, which the plain one cannot train
TARGETS = {"plain modules": 1.05}
SMALL = {"embed_dim": 192, "depth": 6, "num_heads": 3}


class PlainAdapter(nn.Module):
    """`y + Up(GELU(Down(y)))` on ranges of the output of a frozen layer."""

    def __init__(self, base: nn.Linear, rank: int, rows: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.base, self.rows = base.requires_grad_(False), rows
        widths = [stop - start for start, stop in rows]
        self.downs = nn.ModuleList(nn.Linear(width, rank) for width in widths)
        self.ups = nn.ModuleList(nn.Linear(rank, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output, adapted."""
        y = self.base(x)
        pieces, last = [], 0
        for (start, stop), down, up in zip(self.rows, self.downs, self.ups, strict=True):
            part = y[..., start:stop]
            pieces += [y[..., last:start], part + up(nn.functional.gelu(down(part)))]
            last = stop
        pieces = [piece for piece in (*pieces, y[..., last:]) if piece.shape[-1]]
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def written_out(plain: nn.Module, tuned: nn.Module) -> nn.Module:
    """A copy of `plain` with plain Adapters wherever `tuned` has its own."""
    model = copy.deepcopy(plain).requires_grad_(False)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and name in dict(model.named_parameters()):
            model.get_parameter(name).requires_grad_()  # of the head
    for name, layer in tuned.named_modules():
        if isinstance(layer, AdapterLinear):
            base: Any = model.get_submodule(name)
            adapted = PlainAdapter(base, layer.spec.rank, layer.spec.rows)
            model.set_submodule(name, adapted.to(layer.weight.device))
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16-autocast"])
def test_step_beside_plain_modules(benchmark: Any, device: torch.device, dtype: str) -> None:
    if device.type == "cuda":
        setting, batch = CostSetting(device="cuda", dtype=dtype), 64
    else:
        setting, batch = CostSetting("vit_tiny_patch16_224", SMALL, dtype=dtype), 8
    torch.manual_seed(0)
    plain = setting.build().to(device)
    shape = setting.image_shape(plain)
    tunable = tune_for_costs(copy.deepcopy(plain), setting.method(METHOD, plain), shape)
    rival = replace(tunable, model=written_out(plain, tunable.model), plan=None)
    trained = [
        sum(p.numel() for p in t.model.parameters() if p.requires_grad) for t in (tunable, rival)
    ]
    assert trained[0] == trained[1]
    n_adapters = sum(isinstance(m, AdapterLinear) for m in tunable.model.modules())
    steps: dict[str, Callable[[], object]] = {
        METHOD: make_step(tunable, shape, batch, setting),
        "plain modules": make_step(rival, shape, batch, setting),
    }
    depth = len(plain.blocks)  # type: ignore[arg-type]
    what = f"{n_adapters} Adapters in {setting.model} of {depth} blocks, batch {batch}, {dtype}"
    hold(benchmark, f"training step: {what}", steps, rounds=15, targets=TARGETS)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
