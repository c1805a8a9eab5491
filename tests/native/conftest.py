"""What the tests of the C++ module share: each code path, any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spt_kernels import native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if native.available():
        return
    skip = pytest.mark.skip(reason=native.why_unavailable())
    for item in items:
        if "tests/native/" in item.nodeid:
            item.add_marker(skip)


@pytest.fixture(params=["portable", "avx2"])
def code_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each code path that every kernel has."""
    yield from _limited_to(request.param)


@pytest.fixture(params=native.INSTRUCTION_SETS)
def any_code_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Like `code_path`, with AVX-512 as well, for which some ops have code of their own."""
    yield from _limited_to(request.param)


def _limited_to(path: str) -> Iterator[str]:
    native.limit_instruction_set(path)
    found = native.instruction_set()
    if found == path:
        yield path
    native.limit_instruction_set(native.INSTRUCTION_SETS[-1])
    if found != path:
        pytest.skip(f"this processor has no {path}")


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Lets a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
