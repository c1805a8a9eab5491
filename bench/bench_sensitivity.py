"""Sensitivity of all parameters of a ViT beside an ordinary pass and what a user would take."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import spt_kernels as spt
from spt_kernels.costs.sensitivity_speed import square_batch_gradients, square_with_vmap
from spt_kernels.finetuning.demo import one_thread
from spt_kernels.memory.ledger import Ledger
from spt_kernels.model import candidate_names

from .contest import hold
from .operators import count_operators

ORDINARY = "ordinary forward + backward"
TARGET = {ORDINARY: 1.15}
MIB = 2**20
PEAK_OURS = "peak besides weights, MiB: ours, its scores included"
PEAK_ORDINARY = "peak besides weights, MiB: ordinary, its gradients included"

Batch = tuple[Tensor, Tensor]
Peer = Callable[[nn.Module, Batch], Callable[[], object]]


def model_and_batch(
    width: str, size: int, device: torch.device, pixels: int = 224
) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = timm.create_model(f"vit_{width}_patch16_224", num_classes=100, img_size=pixels)
    images = torch.randn(size, 3, pixels, pixels, device=device)
    return model.to(device).eval(), (images, torch.randint(100, (size,), device=device))


class Measurement:
    """`measure_sensitivity` over an endless stream of one batch: each call lets one more through.

    So a call takes what a batch costs, and not what a measurement costs once (the probe on two
    samples, and the check of the scores), which of 800 samples is little.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        facts: dict[str, float | str],
        autocast: bool = False,
    ) -> None:
        self._model = model
        self._batch = batch
        self._facts = facts
        self._autocast = autocast
        self._wanted: queue.Queue[bool] = queue.Queue()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self) -> None:
        """Measure one more batch."""
        self._done.clear()
        self._wanted.put(True)
        while not self._done.wait(timeout=1):
            if not self._thread.is_alive():
                raise RuntimeError("the measurement failed, see the trace of its thread")

    def finish(self) -> None:
        """End the stream."""
        self._wanted.put(False)
        self._thread.join()

    def _run(self) -> None:
        self._ledger = ledger_beyond(self._model, self._batch)
        # until the second batch is asked for; a mode belongs to its thread
        self._ledger.__enter__()
        device = self._batch[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            spt.measure_sensitivity(
                self._model,
                self._batches(),
                num_samples=2**62,
                progress=lambda done, wanted: self._done.set(),
            )

    def _batches(self) -> Iterator[Batch]:
        is_counted = True
        while self._wanted.get():
            if not is_counted and PEAK_OURS not in self._facts:
                self._stop_counting()
            yield self._batch
            is_counted = False

    def _stop_counting(self) -> None:
        self._ledger.__exit__(None, None, None)
        self._facts[PEAK_OURS] = round(peak_beyond(self._ledger) / MIB)


def ledger_beyond(model: nn.Module, batch: Batch) -> Ledger:
    """A ledger of real tensors in which a model and a batch are entered as weights."""
    ledger = Ledger(counted=Tensor)
    ledger.mark([*model.parameters(), *model.buffers(), *batch], "weights")
    return ledger


def peak_beyond(ledger: Ledger) -> int:
    """Most bytes that were alive at once besides these."""
    return sum(size for category, size in ledger.peak().items() if category != "weights")


def ordinary(
    model: nn.Module, batch: Batch, facts: dict[str, float | str] | None = None
) -> Callable[[], None]:
    """A forward and a backward pass; the first one is counted."""
    model.requires_grad_(True)

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    def count_or_run() -> None:
        if facts is None or PEAK_ORDINARY in facts:
            return run()
        with ledger_beyond(model, batch) as ledger:
            run()
        facts[PEAK_ORDINARY] = round(peak_beyond(ledger) / MIB)

    return count_or_run


def batch_of_one(model: nn.Module, batch: Batch) -> Callable[[], None]:
    names = candidate_names(model)

    def run() -> None:
        ones = zip(*(tensor.split(1) for tensor in batch), strict=True)
        square_batch_gradients(model, names, ones)

    return run


def func_vmap(model: nn.Module, batch: Batch) -> Callable[[], object]:
    names = candidate_names(model)
    return lambda: square_with_vmap(model, names, batch)


def backpack_linear(model: nn.Module, batch: Batch) -> Callable[[], None]:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import SumGradSquared

    names = set(candidate_names(model))
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in names:
            backpack.extend(module.requires_grad_(True))
    scores = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        model.zero_grad()
        with backpack.backpack(SumGradSquared()):
            F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
        for score, parameter in zip(scores, trained, strict=True):
            score += parameter.sum_grad_squared

    return run


def test_vit_b16(benchmark: Any, device: torch.device) -> None:
    contest(benchmark, "base", 16, device, targets=TARGET)


def test_peers(benchmark: Any, device: torch.device) -> None:
    peers = {"a batch-of-one loop": batch_of_one, "torch.func vmap(grad)": func_vmap}
    contest(benchmark, "small", 8, device, peers=peers)


def test_backpack(benchmark: Any, device: torch.device) -> None:
    # at 64 pixels: it makes the gradient of every token, which takes minutes at 224
    peers = {"BackPACK SumGradSquared (Linear only, no norms)": backpack_linear}
    contest(benchmark, "tiny", 8, device, peers=peers, pixels=64)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_growth_with_the_batch(benchmark: Any, device: torch.device, size: int) -> None:
    contest(benchmark, "tiny", size, device, rounds=3, growth=("batch of a ViT-Ti/16", size))


@pytest.mark.parametrize(("name", "width"), [("tiny", 192), ("small", 384), ("base", 768)])
def test_growth_with_the_width(benchmark: Any, device: torch.device, name: str, width: int) -> None:
    contest(benchmark, name, 2, device, growth=("width of a ViT/16, batch 2", width))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@one_thread()
def test_host(benchmark: Any, autocast: bool) -> None:
    """So narrow that next to no arithmetic is left: what remains is the host's part."""
    model, plain = (_narrow_model() for _ in range(2))
    batch = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    facts: dict[str, float | str] = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run = ordinary(plain, batch)
        facts["operators: ordinary"] = count_operators(run)
        facts["operators: ours"] = _operators_of_a_batch(model, batch)

        def autocast_run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                run()

        measurement = Measurement(model, batch, facts, autocast)
        try:
            hold(
                benchmark,
                "host of a measured batch: ViT, 12 blocks of width 48, batch 8, one thread, "
                + ("bf16 autocast" if autocast else "fp32"),
                {"spt.measure_sensitivity, a batch of it": measurement, ORDINARY: autocast_run},
                rounds=40,
                facts=facts,
            )
        finally:
            measurement.finish()


def _narrow_model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape).eval()


def _operators_of_a_batch(model: nn.Module, batch: Batch) -> int:
    few, many = (
        count_operators(
            partial(spt.measure_sensitivity, model, [batch] * n, num_samples=10**6, progress=False)
        )
        for n in (2, 4)
    )
    return (many - few) // 2


def contest(
    benchmark: Any,
    width: str,
    size: int,
    device: torch.device,
    *,
    peers: Mapping[str, Peer] | None = None,
    pixels: int = 224,
    rounds: int = 2,
    growth: tuple[str, float] | None = None,
    targets: Mapping[str, float] | None = None,
) -> None:
    model, batch = model_and_batch(width, size, device, pixels)
    facts: dict[str, float | str] = {}
    flops = _flops(model, batch)
    others = {ORDINARY: ordinary(_copy(width, device, pixels), batch, facts)}
    for name, peer in (peers or {}).items():
        others[name] = peer(_copy(width, device, pixels), batch)
    measurement = Measurement(model, batch, facts)
    try:
        hold(
            benchmark,
            f"sensitivity: ViT-{width}/16, {pixels} pixels, batch {size}, fp32, "
            f"{len(candidate_names(model))} parameters",
            {"spt.measure_sensitivity, a batch of it": measurement, **others},
            rounds=rounds,
            flops=flops,
            targets=targets,
            growth=growth,
            facts=facts,
        )
    finally:
        measurement.finish()


def _copy(width: str, device: torch.device, pixels: int) -> nn.Module:
    return model_and_batch(width, 1, device, pixels)[0]


def _flops(model: nn.Module, batch: Batch) -> int:
    """Of a forward and backward pass; gradients by sample need the very same."""
    with FlopCounterMode(display=False) as counter:
        ordinary(model, (batch[0][:1], batch[1][:1]))()
    model.zero_grad()
    return counter.get_total_flops() * len(batch[0])
