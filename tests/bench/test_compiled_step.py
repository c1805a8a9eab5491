"""The account of a compiled step: against the same code's own arithmetic, and beside a LoRA."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.compiled.ledger import Buffer, CardRun, Memory
from bench.compiled.step import CompiledStep, account, main
from spt_kernels.layers import LoraLinear
from spt_kernels.plan import LoraSpec

# Inductor's inner functions change from version to version, and a card is not to be pretended
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or torch.__version__ < "2.13",
    reason="accounts without a card, by the Inductor of torch 2.13 or newer",
)

CODE = """
kernel_0 = async_compile.triton('kernel_0', '')

class Runner:
    def call(self, args):
        x, = args
        args.clear()
        first = empty_strided_cuda((1000, 4), (4, 1), torch.float32)
        kernel_0.run(x, first, 4000, stream=0)
        second = empty_strided_cuda((1000, 4), (4, 1), torch.bfloat16)
        extern_kernels.mm(first, x, out=second)
        del first
        third = reinterpret_tensor(second, (4000, ), (1, ), 0)
        del second
        work = empty_strided_cuda((4096, ), (1, ), torch.float32)
        fourth = work[0 * (2048) : (0 + 1) * (2048)].view(32, 64).sum(dim=0).view([64])
        del work
        return (third, fourth, )

runner = Runner()
"""


def test_what_is_alive_when() -> None:
    memory = Memory()
    run = CardRun(memory)
    results = run.run(CODE, [Buffer((4, 4), (4, 1), torch.float32)])
    # 16,000 and 8,000 in blocks of 512; then the latter, a workspace and a sum
    assert memory.peak_bytes == max(16384 + 8192, 8192 + 16384 + 512)
    assert memory.now_bytes == 8192 + 512
    assert dict(run.launches) == {"triton": 1, "mm": 1, "sum": 1}
    del results
    assert memory.now_bytes == 0


class Mlp(nn.Module):
    """Two layers, the first of which is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.up.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def test_what_a_small_model_keeps() -> None:
    step = account(Mlp(), torch.empty(32, 64), autocast=False)
    # GELU's output for the product of the gradient; its input needs no gradient
    assert step.kept_bytes == 32 * 256 * 4 + 32 * 64 * 4  # and what the loss is given
    assert step.forward["mm"] + step.forward["addmm"] == 2
    assert step.backward["mm"] == 1  # of the second weight alone
    assert step.peak_bytes >= sum(p.numel() for p in Mlp().parameters()) * 4 + step.kept_bytes


def test_thin_products_are_part_of_what_reads_them() -> None:
    spec = LoraSpec(8, ((0, 128), (128, 256)), 64, 1.0, 0.1)
    model = nn.Sequential(nn.Linear(64, 64), LoraLinear(nn.Linear(64, 256), spec))
    step = account(model, torch.empty(32, 64), autocast=True)
    # the base layers and what goes into both ranges; the updates are sums within other code
    assert step.forward["mm"] + step.forward["addmm"] == 2 + 1
    # gradients: of the first layer's weight, of what comes from the base layer, of the bottleneck,
    # of both factors
    products = step.backward["mm"] + step.backward["mm_dtype"] + step.backward["addmm"]
    assert products == 5


def test_main_prints_a_line_for_each_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a ViT is compiled once; the second method is said to take more, by so much
    more = CompiledStep(3 * 2**30, 0, Counter(mm=7), Counter(mm=5))

    def accounted(model: nn.Module, images: Tensor, autocast: bool) -> CompiledStep:
        return more if model.cls_token.requires_grad else account(model, images, autocast)

    monkeypatch.setattr("bench.compiled.step.account", accounted)
    shape = '{"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}'
    main(
        ["linear", "full", "--batch", "2", "--model", "vit_tiny_patch16_224", "--model-args", shape]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in rows] == ["linear", "full"]
    assert rows[0]["ratio"] == rows[0]["launch_ratio"] == 1.0
    assert rows[0]["launches"] == sum([*rows[0]["forward"].values(), *rows[0]["backward"].values()])
    assert rows[0]["forward"]["triton"] > rows[0]["backward"]["triton"] > 0
    assert (rows[1]["peak_gib"], rows[1]["launches"]) == (3.0, 12)
    assert rows[1]["launch_ratio"] == round(12 / rows[0]["launches"], 2)
