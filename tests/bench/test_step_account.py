"""What a step launches and moves on a card, accounted: by hand, and beside PEFT's LoRA-16."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import step_account
from bench.step_account import StepAccount, account
from spt_kernels.layers import LoraLinear
from spt_kernels.memory.work import WorkCounter
from spt_kernels.ops.launching import as_on_card
from spt_kernels.plan import LoraSpec

SHAPE = (64, 3, 224, 224)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=100)


def of(vit: nn.Module, method: str) -> StepAccount:
    return account(vit, SHAPE, method, "bf16-autocast")


def test_a_step_launches_and_moves_no_more_than_loras(vit: nn.Module) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    rival = of(vit, "peft-lora-16")
    lora, unstructured = of(vit, "spt-lora"), of(vit, "spt-unstructured")
    assert lora.launches <= 1.1 * rival.launches
    assert unstructured.launches <= rival.launches
    assert max(lora.moved_gb, unstructured.moved_gb) <= rival.moved_gb
    assert max(lora.kernel_ms, unstructured.kernel_ms) <= 1.04 * rival.kernel_ms


def test_launches_of_a_lora_by_hand() -> None:
    counter = WorkCounter()
    with FakeTensorMode(), as_on_card():
        linear = nn.Linear(64, 96, dtype=torch.bfloat16)
        lora = LoraLinear(linear, LoraSpec(4, ((0, 96),), 64, dropout=0.1))
        x, gy = (torch.randn(32, n, dtype=torch.bfloat16) for n in (64, 96))
        x.requires_grad_()
        with counter:
            y = lora(nn.functional.gelu(x))
            forward = counter.work().launches
            y.backward(gy)
    assert forward == 4  # the GELU, the base's product, down and up
    # of the bottleneck, of A (partial sums and their sum) and of B; the base's product, the LoRA's
    # way down added, and the GELU's: its output is not made again
    assert counter.work().launches - forward == 7


def test_the_command_prints_ratios_to_its_first_method(capsys: pytest.CaptureFixture[str]) -> None:
    small = json.dumps({"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1})
    sizes = ["--model", "vit_tiny_patch16_224", "--model-args", small, "--batch", "2"]
    step_account.main(["full", "linear", *sizes, "--dtype", "fp32", "--markdown"])
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows[2:]] == ["full", "linear"]
    assert all("(1.00)" in cell for cell in rows[2][2:-1])
    assert all("(0." in cell for cell in rows[3][2:-1])
    step_account.main(["full", *sizes, "--dtype", "bf16"])
    assert "GB moved" in capsys.readouterr().out
    assert torch.get_default_dtype() is torch.float32
