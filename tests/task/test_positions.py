"""Positions as bytes: round trips, the promised size, and refusal of everything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_kernels.task.file.positions import decode_positions, encode_positions


def gaps_as_leb128(positions: list[int]) -> bytes:
    """The same encoding, one position at a time."""
    encoded, last = bytearray(), -1
    for position in positions:
        gap, last = position - last - 1, position
        while gap >= 128:
            encoded.append(gap % 128 + 128)
            gap //= 128
        encoded.append(gap)
    return bytes(encoded)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 2**31 - 2) | st.integers(0, 300), max_size=50).map(sorted))
def test_round_trip(positions: list[int]) -> None:
    encoded = encode_positions(torch.tensor(positions, dtype=torch.int64))
    assert encoded.numpy().tobytes() == gaps_as_leb128(positions)
    decoded = decode_positions(encoded, len(positions), 2**31 - 1)
    assert decoded.dtype == torch.int64
    assert decoded.tolist() == positions


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12), st.integers(0, 6), st.integers(0, 2**31))
def test_any_bytes_give_valid_positions_or_an_error(data: bytes, count: int, numel: int) -> None:
    encoded = torch.tensor(list(data), dtype=torch.uint8)
    try:
        positions = decode_positions(encoded, count, numel).tolist()
    except ValueError:
        return
    assert len(positions) == count
    assert positions == sorted(set(positions))
    assert all(0 <= p < numel for p in positions)
    assert gaps_as_leb128(positions) == data  # one encoding per list of positions


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_runs_take_one_byte_each(dtype: torch.dtype) -> None:
    run = torch.arange(1000, 2000, dtype=dtype)
    assert encode_positions(run).numel() == 1001  # the first gap, 1000, takes two


@pytest.mark.parametrize("nnz", [140, 5_555, 11_000], ids=lambda n: f"{n}-of-3072x768")
def test_at_most_two_bytes_each_and_one_per_16384_elements(nnz: int) -> None:
    # the worst case: as many gaps of three bytes as fit in the elements, all others of two
    numel = 3072 * 768
    wide = min(nnz, (numel - nnz * 129) // (16_384 - 128))
    gaps = torch.tensor([16_384] * wide + [128] * (nnz - wide)) + 1
    positions = gaps.cumsum(0) - 1
    assert positions[-1] < numel
    assert 2 * nnz < encode_positions(positions).numel() <= 2 * nnz + numel / 16_384


@pytest.mark.parametrize(
    "positions",
    [[3, 2], [2, 2], [-1, 2], [0, 2**31]],
    ids=["unsorted", "repeated", "negative", "too-large"],
)
def test_encode_refuses(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="sorted, unique"):
        encode_positions(torch.tensor(positions))


@pytest.mark.parametrize(
    ("data", "count", "numel", "message"),
    [
        (b"\x05", 1, 5, "position 5 is out of range for 5 elements"),
        (b"\x05\x80", 1, 100, "a cut one"),
        (b"\x05\x05", 1, 100, "expected 1 positions, got 2"),
        (b"\x80\x00", 1, 100, "more bytes than it needs"),
        (b"\xff\xff\xff\xff\xff\x01", 1, 100, "takes 6 bytes"),
        (b"\x00\x00", 2, 1, "2 positions in a tensor of 1"),
        (b"\xff\xff\xff\xff\x7f" * 4, 4, 2**31, "out of range"),
    ],
    ids=["out-of-range", "cut", "too-many", "overlong", "six-bytes", "crowded", "far-out"],
)
def test_decode_refuses(data: bytes, count: int, numel: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_positions(torch.tensor(list(data), dtype=torch.uint8), count, numel)
