"""What a ledger tells of a step, against all its events added up one after the other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spt_kernels.memory.cuda import CudaLedger
from spt_kernels.memory.ledger import CATEGORIES, Ledger

Events = list[tuple[int, int]]


def added_up(ledger: Ledger, events: Events) -> dict[str, int]:
    totals = dict.fromkeys(CATEGORIES, 0)
    for entry, sign in events:
        totals[ledger._categories.get(entry, "temporary")] += sign * ledger._sizes[entry]
    return totals


def highest_from(ledger: Ledger, since: int) -> dict[str, int]:
    """By the words of `peak_of_step`: every moment from `since` on is looked at."""
    events = list(ledger._events)
    net = dict.fromkeys((entry for entry, _ in events), 0)
    for entry, sign in events:
        net[entry] += sign
    left = {e for e, n in net.items() if n and ledger._categories.get(e) != "gradients"}
    after = events[since:]
    order = [*events[:since], *[(e, 1) for e, _ in after if e in left]]
    order += [event for event in after if event[0] not in left]
    moments = [added_up(ledger, order[:at]) for at in range(since + 1, len(order) + 1)]
    sizes = [sum(moment.values()) for moment in moments]
    if not sizes or max(sizes) <= 0:
        return dict.fromkeys(CATEGORIES, 0)
    return moments[sizes.index(max(sizes))]


class FromMoment(list[Any]):
    """Events of which none before a moment may be looked at."""

    since = 0

    def __iter__(self) -> Any:
        raise AssertionError("all events are gone through")

    def __getitem__(self, place: Any) -> Any:
        assert isinstance(place, slice)
        assert place.start >= self.since
        return super().__getitem__(place)


@pytest.mark.parametrize("seed", range(8))
def test_the_peak_of_a_step_is_that_of_all_its_moments(seed: int) -> None:
    draw = random.Random(seed)
    ledger, held, moments = Ledger(), list[Tensor](), []
    with FakeTensorMode(), ledger:
        for _ in range(60):
            moments.append(ledger.moment())
            if held and draw.random() < 0.5:
                held.pop(draw.randrange(len(held)))
            else:
                held.append(torch.empty(draw.randrange(1, 50)))
                if draw.random() < 0.7:
                    ledger.mark([held[-1]], draw.choice(CATEGORIES))
    moments.append(ledger.moment())
    events = list(ledger._events)
    for since in moments:
        assert ledger.peak_of_step(since) == highest_from(ledger, since)
        curve = [
            sum(added_up(ledger, events[:at]).values()) for at in range(since, len(events) + 1)
        ]
        assert ledger.curve(since) == curve
    assert ledger.bytes_alive() == added_up(ledger, events)
    sizes = [sum(added_up(ledger, events[:at]).values()) for at in range(len(events) + 1)]
    assert ledger.peak() == added_up(ledger, events[: sizes.index(max(sizes))])


def test_what_was_before_a_step_is_not_gone_through_again() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        kept = torch.empty(10)
        for _ in range(5):
            torch.empty(3)
        since = ledger.moment()
        torch.empty(20)
    ledger._events = FromMoment(ledger._events)
    ledger._events.since = since
    assert sum(ledger.peak_of_step(since).values()) == 4 * 30
    assert ledger.curve(since) == [40, 120, 40]
    assert sum(ledger.bytes_alive().values()) == 4 * len(kept)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("n_tokens", [200, 1_576, 12_608])
@pytest.mark.parametrize(("n_features", "rank"), [(768, 8), (768, 24), (3072, 64), (192, 16)])
def test_a_ledger_of_cuda_counts_what_a_loras_gradient_adds_up(
    n_tokens: int, n_features: int, rank: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from spt_kernels.kernels import low_rank_grad, token_split
    from spt_kernels.kernels.low_rank_parts import blocks_of

    monkeypatch.setattr(token_split, "multiprocessors_of", lambda device: 132)
    sizes = blocks_of(torch.bfloat16, rank, is_made=activation != "none")
    blocks = -(-n_features // sizes["BLOCK_FEATURES"])
    launch = low_rank_grad._launch(sizes["BLOCK_RANK"], 90)
    parts, _ = token_split.split_tokens.__wrapped__(n_tokens, blocks, launch, torch.device("cpu"))
    result = 4 * rank * n_features
    with FakeTensorMode(), CudaLedger() as ledger:
        x, grad_inner = (torch.empty(n_tokens, n, dtype=torch.bfloat16) for n in (n_features, rank))
        before = sum(ledger.bytes_alive().values())
        grad = torch.ops.spt.low_rank_grad(x, grad_inner, 0.1, 0, None, activation)
    assert grad.nbytes == result
    beside = sum(ledger.peak().values()) - before - result
    assert beside == 0 if parts == 1 else 0 < beside <= 1.1 * parts * result
    assert beside >= 0.9 * (parts - 1) * result
