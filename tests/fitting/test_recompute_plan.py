"""`recompute(memory_bytes=…)`: it fits, no one level for all that fits is faster, it is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spt_kernels import RecomputePlan, estimate_memory, recompute
from spt_kernels.fitting import CARDS, Levels
from spt_kernels.memory import Rehearsal
from spt_kernels.recomputation import RecomputeWords
from tests.models import tiny_swin, tiny_vit
from tests.recomputation.steps import take_step, tuned

SHAPE = (64, 3, 16, 16)
CARD = CARDS["RTX 3060"]


def vit() -> nn.Module:
    return tiny_vit(depth=4, width=48).train()


@pytest.fixture(scope="module")
def levels() -> Levels:
    return Levels(vit(), SHAPE, CARD)


def peak_of(what: Any) -> int:
    return estimate_memory(vit(), SHAPE, recompute=what).peak_bytes


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_plan_fits_and_uses_what_there_is(levels: Levels, share: float) -> None:
    least, most = peak_of("block"), peak_of("nothing")
    memory_bytes = int(least + share * (most - least))
    plan = levels.plan(memory_bytes)
    assert peak_of(plan.blocks) == plan.peak_bytes <= memory_bytes
    assert plan.plain_peak_bytes == most
    assert memory_bytes - plan.peak_bytes < 0.1 * most


def test_no_level_for_all_blocks_is_faster(levels: Levels) -> None:
    rehearsal = Rehearsal(vit(), image_shape=SHAPE[1:])
    rehearsal.at(SHAPE)  # the optimizer makes its state in the first step

    def seconds_of(words: str) -> float:
        rehearsal.recompute(words)
        return CARD.seconds_of(rehearsal.with_work(SHAPE)[1], captured=True)

    for words in ("mlp", "mlp,attention"):
        plan = levels.plan(peak_of(words.split(",")))
        assert seconds_of(str(RecomputeWords.of(plan.blocks))) <= seconds_of(words) * 1.000001


def test_what_fits_as_it_is_stays_as_it_is(levels: Levels) -> None:
    plan = levels.plan(2**40)
    assert not plan
    assert set(plan.saved_bytes.values()) == {0}
    assert plan.peak_bytes == plan.plain_peak_bytes


def test_too_little_memory_names_the_least(levels: Levels) -> None:
    with pytest.raises(ValueError, match=r"takes at least [\d,]+ MiB \(.*\), got 1 MiB") as error:
        levels.plan(2**20)
    named = int(str(error.value).split("at least ")[1].split(" MiB")[0].replace(",", ""))
    assert named <= peak_of("block") / 2**20 + 1


def test_the_model_then_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    images, target = torch.randn(SHAPE), torch.randint(5, SHAPE[:1])
    model = tuned(tiny_vit(width=48), "lora")
    plain = take_step(model, (images, target))
    limit = 0.7 * estimate_memory(model, SHAPE).peak_bytes
    plan = recompute(model, memory_bytes=limit, batch_shape=SHAPE, card="H100")
    assert isinstance(plan, RecomputePlan)
    assert plan
    assert estimate_memory(model, SHAPE).peak_bytes == plan.peak_bytes <= limit
    assert take_step(model, (images, target)).is_same_as(plain)


def test_a_model_of_stages() -> None:
    shape = (16, 3, 32, 32)
    model = tiny_swin().train()
    limit = 0.8 * estimate_memory(model, shape).peak_bytes
    assert recompute(model, memory_bytes=limit, batch_shape=shape)
    assert estimate_memory(model, shape).peak_bytes <= limit


def test_the_table_tells_each_block(levels: Levels) -> None:
    plan = levels.plan(int(0.7 * peak_of("nothing")))
    lines = plan.summary().splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == [f"blocks.{n}" for n in range(4)]
    total = sum(float(line.split()[-2].replace(",", "")) for line in lines[1:-2])
    assert float(lines[-2].split()[-2].replace(",", "")) == pytest.approx(total, abs=0.3)
    assert "accounted" in lines[-1]


class Backwards(nn.Module):
    """Calls its blocks in another order than they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.blocks[0](self.blocks[1](x))
        return result


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "what: expected an option"),
        ({"what": "mlp", "card": "H100"}, TypeError, "card: is for memory_bytes"),
        ({"what": "mlp", "dtype": "bf16"}, TypeError, "dtype: is for memory_bytes"),
        ({"what": "mlp", "memory_bytes": 9}, TypeError, "what: memory_bytes chooses it"),
        ({"memory_bytes": "9"}, TypeError, "memory_bytes must be a number of bytes, got '9'"),
        ({"memory_bytes": 0.0, "batch_shape": SHAPE}, ValueError, "memory_bytes must be at least"),
        ({"memory_bytes": 9}, TypeError, "batch_shape: memory_bytes needs the shape"),
        ({"memory_bytes": 9, "batch_shape": SHAPE, "card": "C64"}, ValueError, "card: expected"),
    ],
)
def test_mistakes(arguments: Mapping[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        recompute(vit(), **arguments)


def test_models_without_blocks_in_order() -> None:
    options: Any = {"memory_bytes": 2**30, "loss_fn": lambda output, _: F.mse_loss(output, output)}
    with pytest.raises(ValueError, match="Linear has no blocks that can be told by name"):
        recompute(nn.Linear(8, 8), batch_shape=(2, 8), **options)
    with pytest.raises(ValueError, match=r"in their order, got the order blocks\.1, blocks\.0"):
        recompute(Backwards(), batch_shape=(2, 8), **options)


def test_estimates_say_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="recompute='mlp' is for training"):
        estimate_memory(vit(), SHAPE, training=False, recompute="mlp")
