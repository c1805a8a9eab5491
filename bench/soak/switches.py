"""Endless switches of tasks while others ask: outputs are each task's own, memory stays flat."""

from __future__ import annotations

import gc
import random
import resource
import tempfile
import threading
from pathlib import Path

import torch

import spt_kernels as spt

from .small import base_model, tuned_model

_THREADS = 3
_GROWTH_KIB = 64 * 1024  # of the resident memory, what allocators keep


def check(count: int, seed: int) -> str:
    """Let threads switch one bank `count` times in all.

    Raises:
        AssertionError: an output is another task's, the base has changed, or memory has grown.
    """
    model = base_model().eval()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        bank, expected = spt.TaskBank(model, max_tasks=3), {None: model(images)}
        for n in range(5):
            path = Path(place) / f"{n}.safetensors"
            spt.save_delta(tuned_model(n), path)
            expected[f"{n}"] = spt.load_delta(base_model().eval(), path)(images)
            bank.load(f"{n}", path)
        failures: list[str] = []

        def ask(own: int) -> None:
            dice = random.Random(f"{seed} {own}")
            with torch.no_grad():
                for n in range(own, count, _THREADS):
                    if failures:
                        return
                    name = dice.choice([*expected])
                    with bank.using(name):
                        found = model(images)
                    if not torch.allclose(found, expected[name], atol=1e-5):
                        failures.append(f"switch {n}: {name} gave what it does not give alone")

        sizes = []
        for _ in range(2):  # the second half may need no more than the first
            threads = [threading.Thread(target=ask, args=(n,)) for n in range(_THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures, failures[0]
            gc.collect()
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        bank.use(None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name]), f"{name} is not what it was"
    assert sizes[1] - sizes[0] < _GROWTH_KIB, f"memory grew by {sizes[1] - sizes[0]:,} KiB"
    return (
        f"{2 * count:,} switches in {_THREADS} threads, {sizes[1] - sizes[0]:,} KiB more at the end"
    )
