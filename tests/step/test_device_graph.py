"""One call as a graph, and what a capture that fails leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels.step.device_graph import DeviceGraph, refusing_waits
from tests.card.on_card import Pretence
from tests.card.pretend import pretended_card


def test_a_replay_reads_what_is_there_now() -> None:
    with pretended_card():
        x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")

        def run() -> Tensor:
            total.add_(x)
            return (x * 2).sum()

        graph = DeviceGraph(torch.cuda.Stream())
        found = graph.capture(run)
        assert total.tolist() == [0.0] * 3  # nothing is computed by a capture
        for value in (2.0, 5.0):
            x.fill_(value)
            graph.replay()
            assert float(found) == 6 * value
        assert total.tolist() == [7.0] * 3


def test_a_capture_that_fails_is_over() -> None:
    with pretended_card():
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="stream is capturing"):
            DeviceGraph(torch.cuda.Stream()).capture(lambda: float(x.sum()))
        assert Pretence.recorder is None
        assert float(x.sum()) == 3.0


def test_waits_are_refused_for_a_while() -> None:
    with pretended_card():
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="makes the host wait") as refused, refusing_waits():
            float(x.sum())
        assert "synchronizing" in str(refused.value.__cause__)
        with pytest.raises(RuntimeError, match="of another kind"), refusing_waits():
            raise RuntimeError("of another kind")
        assert torch.cuda.get_sync_debug_mode() == 0
        assert float(x.sum()) == 3.0
