"""What every test process sets: Triton defaults, threads, GPU tests skipped without a GPU."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Generator, Iterator

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # newer Triton warns unless it is pinned
# read at the first product on a card, and asked for by the tests that want the same bits of it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["SPT_KERNELS_RATES"] = ""  # no test hangs on what was measured on its card
# Tiny models on busy machines: threads that spin while they wait make everything many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests side by side take one thread each, and so do the processes that they start
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    # what is imported is no garbage, and stays: half a million objects that no search goes through
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(5000)  # tests leave little garbage, and search for it where it matters
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_parser() -> Iterator[None]:
    """The command line's parser is built once, not for each of the tests' hundreds of calls."""
    from typer import main

    from spt_kernels.cli import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "make_app", functools.cache(app.make_app))
        patch.setattr(main, "get_command", functools.cache(main.get_command))
        yield
