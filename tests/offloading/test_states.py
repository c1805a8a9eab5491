"""What an offloaded model gives to be kept, leaves on the host, and needs of where it is used."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.offloading import blocks_on_host

from .runs import DEPTH, assert_same, loss_of, there, torchs, train, tuned, values_of


def test_whatever_the_default_device_is() -> None:
    expected = train(tuned("full"), torchs), train(tuned("spt-lora"), autocast=True)
    model, other = tuned("full"), tuned("spt-lora")
    with torch.device("meta"):
        optimizer = spt.OffloadedAdamW(model.parameters(), lr=1e-2)
        spt.offload(other)
    assert_same(train(model, lambda _: optimizer), expected[0])
    assert_same(train(other, autocast=True), expected[1])


def test_memory_of_the_host_goes_without_the_garbage_collector(tmp_path: Path) -> None:
    model = tuned("spt-lora")
    spt.offload(model)
    uses = (lambda: spt.save_delta(model, tmp_path / "task"), lambda: spt.offload(model, "nothing"))
    gc.collect()
    gc.disable()
    try:
        for use in uses:
            loss_of(model, 0, autocast=True).backward()
            held = [
                weakref.ref(pinned)
                for block in blocks_on_host(model)
                for pinned in block._pinned.values()
            ]
            assert len(held) == 2 * DEPTH
            use()
            assert not any(ref() for ref in held)
    finally:
        gc.enable()


def test_a_state_dict_of_several_dtypes_can_be_saved() -> None:
    model = tuned("linear")
    model.blocks[0].mlp.bfloat16()  # type: ignore[index,union-attr]
    spt.offload(model)
    expected, file = values_of(model), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert_same(([], torch.load(file)), ([], expected))


def test_training_may_follow_inference_under_autocast() -> None:
    model, other = tuned("spt-lora").eval(), tuned("spt-lora").eval()
    spt.offload(model)
    with torch.inference_mode():
        assert torch.equal(*(loss_of(each, 0, autocast=True) for each in (model, other)))
    found = (train(each.train(), steps=1, autocast=True) for each in (model, other))
    assert_same(*found)


def test_a_task_may_be_saved_and_loaded_in_inference_mode(tmp_path: Path) -> None:
    model, other = tuned("spt-lora"), tuned("spt-lora")
    spt.offload(model)
    for each in (model, other):
        train(each, steps=1)
        with torch.inference_mode():
            spt.save_delta(each, tmp_path / "task")
            spt.load_delta(each, tmp_path / "task")
    assert len(blocks_on_host(model)) == DEPTH
    assert_same(train(model, steps=1), train(other, steps=1))


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_state_dict_has_whole_values_within_a_call(way: str) -> None:
    model = tuned("spt-lora")
    spt.offload(model)
    expected, seen = values_of(model), []

    def interrupt(*_: Any) -> None:
        seen.append(values_of(model))
        raise KeyboardInterrupt

    layer: Any = model.blocks[1].mlp.fc2  # type: ignore[index,union-attr]
    if way == "forward":
        layer.register_forward_pre_hook(interrupt)
    else:
        layer.register_full_backward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, 0, autocast=True).backward()
    for state in (*seen, values_of(model)):  # and after one that was interrupted
        assert_same(([], state), ([], expected))


class Leaving(nn.Module):
    """Blocks of which a forward runs some, from one on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor, first: int = 0, last: int = 4) -> torch.Tensor:
        for block in self.blocks[first:last]:
            x = block(x)
        return x


@torch.no_grad()
def test_what_was_fetched_for_a_block_that_is_not_called_goes_with_the_forward() -> None:
    model, x = Leaving().requires_grad_(False), torch.randn(2, 8)
    spt.offload(model)
    model(x)
    for first, last in ((0, 2), (2, 3), (0, 0)):
        model(x, first, last)
        assert there(model) == []
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :2])
    assert there(model) == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_was_fetched_ahead_of_a_change_is_fetched_again(dtype: torch.dtype | None) -> None:
    model, other = (Leaving().requires_grad_(False) for _ in range(2))
    spt.offload(model)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        model(x)
        model.blocks[0](x)  # past the model, which would give back what comes ahead of the next
        assert there(model) == ["blocks.1"]
        for each in (model, other):
            each.blocks[1][0].weight.mul_(2)
        assert torch.equal(model.blocks[1](x), other.blocks[1](x))
