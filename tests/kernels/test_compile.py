"""Every shipped kernel variant compiles ahead of time, for three generations of cards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import spt_kernels.ops

from .compilation import (
    SHARED_BYTES_LIMIT,
    Failure,
    Key,
    Occupancy,
    compile_all,
    kernel_files,
    kernels_of,
    variants_of,
    widest_load_bits,
)

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET=1: kernels are not compiled")

KEYS: list[Key] = [
    (file, name, capability)
    for file in ([] if interpreted else kernel_files())
    for name in variants_of(file)
    for capability in SHARED_BYTES_LIMIT
]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Mapping[Key, Occupancy | Failure]:
    # only what was selected (-k, a single id), all at once so that every core has work
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    return compile_all(call.params["key"] for call in calls if call and "key" in call.params)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]}-{key[1]}-sm_{key[2]}")
def test_variant_compiles_and_fits(key: Key, compiled: Mapping[Key, Occupancy | Failure]) -> None:
    file, name, capability = key
    occupancy = compiled[key]

    assert not isinstance(occupancy, Failure), occupancy.message
    assert occupancy.local_bytes == 0, f"registers spill: {occupancy}"
    assert occupancy.shared_bytes <= SHARED_BYTES_LIMIT[capability], str(occupancy)
    assert occupancy.load_bits >= variants_of(file)[name].load_bits, f"narrow loads: {occupancy}"


def test_no_kernel_is_left_out() -> None:
    files = kernel_files()
    ops = {path.stem for path in Path(spt_kernels.ops.__path__[0]).glob("*.py")} - {"__init__"}
    assert ops <= set(files)
    for file in files:
        shipped = {variant.kernel.__name__ for variant in variants_of(file).values()}
        assert shipped == set(kernels_of(file)), file


@pytest.mark.parametrize(
    ("ptx", "bits"),
    [
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 128),
        ("ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 ];", 128),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 16),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 128),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 32),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];", 0),
    ],
    ids=["v4xb32", "v2xb64-hint", "b16", "async-16-bytes", "async-4-bytes", "shared"],
)
def test_width_of_a_load_is_read_from_the_ptx(ptx: str, bits: int) -> None:
    assert widest_load_bits(ptx) == bits
