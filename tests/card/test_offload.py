"""Weights on the host of a (pretended) card, which come by a stream of their own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.offloading import blocks_on_host
from spt_kernels.offloading.pinned_tensors import PinnedTensors
from spt_kernels.sensitivity import skewed_sensitivity

from . import steps
from .on_card import CARD, Pretence
from .pretend import pretended_card


def tuned(base: nn.Module, kind: str | None, device: str = "cuda") -> nn.Module:
    model = copy.deepcopy(base).to(device)
    torch.manual_seed(2)
    return spt.apply(model, spt.allocate(skewed_sensitivity(base), steps.BUDGET, kind)).train()


def train(model: nn.Module, n_steps: int = 7) -> list[float]:
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-3)
    images, target = (part.to("cuda") for part in steps.make_batch())
    losses = []
    torch.manual_seed(3)
    for _ in range(n_steps):
        before = Pretence.waits
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss, Pretence.waits - before))
    assert losses[-1][1] == 0  # but for looks in the first steps, the host does not wait
    return [loss.item() for loss, _ in losses]


def test_a_card_trains_the_same_with_weights_on_the_host(tmp_path: Path) -> None:
    base = steps.tiny_vit()
    with pretended_card():
        expected, model = tuned(base, "lora"), tuned(base, "lora")
        spt.offload(model)
        matrix = model.blocks[0].attn.qkv.weight  # type: ignore[index,union-attr]
        assert train(model) == train(expected)
        assert matrix is model.blocks[0].attn.qkv.weight  # type: ignore[index,union-attr]
        assert matrix.device == torch.device("cpu")
        assert model.blocks[0].norm1.weight.device == CARD  # type: ignore[index,union-attr]
        states = [each.state_dict() for each in (model, expected)]
        for name, tensor in states[1].items():
            assert torch.equal(states[0][name].cpu(), tensor.cpu()), name
        for n, each in enumerate((model, expected)):
            spt.save_delta(each, tmp_path / str(n))
        assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
        spt.offload(model, "nothing")
        assert all(p.device == CARD for p in [*model.parameters(), *model.buffers()])
        assert train(model, 1) == train(expected, 1)


def test_a_model_that_never_fits_the_card_comes_from_the_cpu() -> None:
    base = steps.tiny_vit()
    with pretended_card():
        expected, model = tuned(base, None), tuned(base, None, "cpu")
        on_host = sum(spt.offload(model, device="cuda").streamed.values())
        moved = {name for name, p in model.named_parameters() if p.device == CARD}
        assert {"blocks.1.mlp.fc2.bias", "blocks.0.mlp.fc1.delta", "head.weight"} <= moved
        assert "blocks.1.mlp.fc2.weight" not in moved
        assert on_host == sum(block.nbytes for block in blocks_on_host(model))
        assert train(model, 1) == train(expected, 1)
        spt.offload(model, "nothing", device="cpu")
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor.cpu()), name


class Streams:
    """Stand for the streams of a card: which one is given what, in which order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.current = "main"

    def stream(self, name: str) -> Any:
        log = self.log

        class Stream:
            def wait_stream(self, other: Any) -> None:
                log.append((name, "waits for", other.name))

            def wait_event(self, event: Any) -> None:
                log.append((name, "waits for", event))

            def __eq__(self, other: object) -> bool:
                return getattr(other, "name", None) == name

            def __hash__(self) -> int:
                return hash(name)

        made: Any = Stream()
        made.name = name
        return made

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def event(self) -> Any:
        log = self.log

        class Event(str):
            def record(self, stream: Any) -> None:
                log.append((stream.name, "records", self))

        return Event("arrival")


def test_copies_and_computation_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_card():
        streams = Streams()
        current = lambda *_: streams.stream(streams.current)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "current_stream", current)
        monkeypatch.setattr(torch.cuda, "stream", streams.on)
        monkeypatch.setattr(torch.cuda, "Event", streams.event)
        held = torch.arange(6.0).view(2, 3)
        pinned = PinnedTensors([held], [torch.float32], CARD, streams.stream("side"))
        copy_ = Tensor.copy_

        def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            streams.log.append((streams.current, "copies", non_blocking))
            return copy_(target, source, non_blocking)

        monkeypatch.setattr(type(pinned.buffer), "copy_", copied)
        assert pinned.buffer.untyped_storage().nbytes() == 0
        assert pinned.fetch()
        assert not pinned.fetch()
        arrives = [
            ("side", "waits for", "main"),  # the memory may have been another's until now
            ("side", "copies", True),
            ("side", "records", "arrival"),
        ]
        assert streams.log == arrives
        pinned.wait()
        assert streams.log == [*arrives, ("main", "waits for", "arrival")]
        assert torch.equal(pinned.on_device[0].cpu(), held)
        pinned.release()
        assert pinned.buffer.untyped_storage().nbytes() == 0
        # what was fetched and is given back without use: its memory may be the next one's at once
        streams.log.clear()
        pinned.fetch()
        pinned.release()
        assert streams.log == [*arrives, ("main", "waits for", "arrival")]
        recorded: list[Any] = []
        record = lambda buffer, stream: recorded.append(stream.name)  # noqa: E731
        monkeypatch.setattr(type(pinned.buffer), "record_stream", record)
        pinned.fetch()
        with streams.on(streams.stream("another")):
            pinned.wait()
        assert recorded == ["another"]
