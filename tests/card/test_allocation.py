"""What an allocation asks of the (pretended) card that has the scores."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import spt_kernels as spt

from .on_card import OnCard, tensors_in
from .pretend import pretended_card

SHAPES = {"attn.qkv.weight": (72, 24), "attn.qkv.bias": (72,), "mlp.fc1.weight": (96, 24)}
N_BLOCKS, N_SEGMENTS = 3, 3 * (3 + 3 + 1)


class OfCard(TorchDispatchMode):
    """Counts the operators that have tensors of the card, views aside: each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and any(isinstance(t, OnCard) for t in tensors_in((args,))):
            self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_another_budget_costs_a_few_operators_however_many_matrices_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"blocks.{block}.{name}": torch.rand(shape, generator=generator)
        for block in range(N_BLOCKS)
        for name, shape in SHAPES.items()
    }
    expected = spt.allocate_each(spt.Sensitivity.from_tensors(scores, 10), [900, 500, 70], rank=2)
    with pretended_card() as pretence:
        on_card = {name: score.to("cuda") for name, score in scores.items()}
        sensitivity = spt.Sensitivity.from_tensors(on_card, 10)

        def cost(budgets: list[int]) -> tuple[Counter[str], int]:
            before = pretence.waits
            with OfCard() as operators:
                plans = spt.allocate_each(sensitivity, budgets, rank=2)
            assert plans == expected[: len(budgets)]
            return operators.counts, pretence.waits - before

        of_one, of_two, of_three = cost([900]), cost([900, 500]), cost([900, 500, 70])
    assert of_one == ({"spt::top_tau": 1, "aten::cat": 1, "aten::_to_copy": 1}, 1)
    # of each matrix its scores, once; what is left; and one within `repeat_interleave`
    assert of_two[0]["aten::index_select"] == N_SEGMENTS + 2 + 1
    another = of_three[0] - of_two[0]
    assert another.pop("spt::top_tau") == 1
    assert another.total() <= 8, another
    assert of_three[1] - of_two[1] == 1


def test_what_is_forgone_is_told_without_a_wait_for_each_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    waits = []
    for n_biases in (2, 30):
        names = [f"blocks.{n}.mlp.fc1.bias" for n in range(n_biases)]
        scores = {name: torch.rand(7, generator=generator) for name in names}
        scores[names[0]] += 1
        scores["blocks.1.mlp.fc1.weight"] = torch.rand(40, 10, generator=generator)
        expected = spt.allocate(spt.Sensitivity.from_tensors(scores, 10), 12, from_block=1)
        assert expected.forgone > 0
        with pretended_card() as pretence:
            on_card = {name: score.to("cuda") for name, score in scores.items()}
            sensitivity = spt.Sensitivity.from_tensors(on_card, 10)
            before = pretence.waits
            assert spt.allocate(sensitivity, 12, from_block=1) == expected
            waits.append(pretence.waits - before)
    assert waits == [3, 3]
