"""One computation with any number of threads: the same bits."""

from __future__ import annotations

import hashlib
import os

import torch

import spt_kernels as spt

from .small import base_model, random_plan


def check(count: int, seed: int) -> str:
    """Run ops of ours, and allocate, `count` times with each of one to so many threads.

    Raises:
        AssertionError: a number of threads gives other bits.
    """
    numbers = range(1, max(4, os.cpu_count() or 1) + 1)
    before = torch.get_num_threads()
    try:
        for n in range(count):
            found = {}
            for threads in numbers:
                torch.set_num_threads(threads)
                found[threads] = _digest(seed + n)
            assert len(set(found.values())) == 1, f"seed {seed + n}: {found}"
    finally:
        torch.set_num_threads(before)
    return f"{count:,} computations with {numbers[0]} to {numbers[-1]} threads"


def _digest(seed: int) -> str:
    """Of all that comes of ops of ours, on inputs that no library has computed."""
    generator = torch.Generator().manual_seed(seed)
    grad_output = torch.randn(3, 400, 96, generator=generator)
    x = torch.randn(3, 400, 160, generator=generator)
    score = torch.zeros(96, 160)
    spt.ops.accumulate_squared_grad(score, grad_output, x)
    [chosen] = spt.ops.top_tau([score], 300)
    index = chosen.int()
    gradient = spt.ops.sparse_weight_grad(grad_output, x, index)
    weight = torch.randn(96, 160, generator=generator)
    original = weight.view(-1)[chosen].clone()
    spt.ops.write_delta([weight], [index], [original], [gradient])
    plan, hashed = random_plan(base_model(), generator), hashlib.blake2b(digest_size=16)
    for part in (score, chosen, gradient, weight, *plan.unstructured.values()):
        hashed.update(part.contiguous().numpy().tobytes())
    return hashed.hexdigest()
