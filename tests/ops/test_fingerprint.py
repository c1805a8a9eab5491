"""The fingerprint op: the same digits from every backend as from plain Python integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels import native
from spt_kernels.ops.fingerprint import fingerprint
from spt_kernels.reference import fingerprint as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8]
NO_INDEX = torch.empty(0, dtype=torch.int32)


def by_definition(data: bytes) -> str:
    """The sum over words in Python's own integers."""
    wide, low = 2**64 - 1, 2**32 - 1
    data += b"\0" * (-len(data) % 8)
    first = second = 0
    for i in range(len(data) // 8):
        word = int.from_bytes(data[8 * i : 8 * i + 8], "little")
        x = (word + (i + 1) * 0x9E3779B97F4A7C15) & wide
        for factor in (0x7FEB352A, 0x6C8E9CF6, 0x5851F42E):
            x ^= (x & low) * factor
            x = (x << 32 | x >> 32) & wide
        first += x
        second += x ^ ((x & low) * 0x7A1D1B36)
    return f"{first & wide:016x}{second & wide:016x}"


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.rand(n, generator=generator)).to(dtype)


def some_index(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=generator) < 0.3).nonzero().flatten().int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 33, 1001])
def test_is_the_definition(n: int, dtype: torch.dtype) -> None:
    tensor, index = random(n, dtype), some_index(n)
    original = random(len(index), dtype, seed=2)
    changed = tensor.clone()
    changed[index.long()] = original
    found = fingerprint([tensor, tensor, changed], [None, index, None], [None, original, None])
    expected = by_definition(bytes_of(changed))
    assert found == [by_definition(bytes_of(tensor)), expected, expected]
    plain = reference.fingerprint([tensor], [index], [original])
    assert torch.equal(plain, reference.fingerprint([changed], [NO_INDEX], [changed[:0]]))
    assert f"{int(plain[0, 0]) % 2**64:016x}{int(plain[0, 1]) % 2**64:016x}" == expected


@pytest.mark.skipif(not native.available(), reason=native.why_unavailable())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("code_path", ["portable", "avx2"])
def test_native_code_of_many_pieces_is_the_reference(code_path: str, threads: int) -> None:
    tensors = [random(n, d, n) for n, d in [(300_001, torch.float32), (150_003, torch.bfloat16)]]
    indices = [some_index(len(tensor)) for tensor in tensors]
    originals = [random(len(i), t.dtype, 5) for t, i in zip(tensors, indices, strict=True)]
    expected = reference.fingerprint(tensors, indices, originals)
    before = torch.get_num_threads()
    native.limit_instruction_set(code_path)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native.fingerprint(tensors, indices, originals), expected)
    finally:
        torch.set_num_threads(before)
        native.limit_instruction_set(native.INSTRUCTION_SETS[-1])


def test_every_flipped_bit_is_noticed() -> None:
    data = random(80, torch.uint8)
    digests = {fingerprint([data])[0]}
    for position in range(len(data)):
        for bit in range(8):
            flipped = data.clone()
            flipped[position] ^= 1 << bit
            digests.add(fingerprint([flipped])[0])
    assert len(digests) == 1 + 8 * len(data)
    halves = {digest[:16] for digest in digests}, {digest[16:] for digest in digests}
    assert [len(half) for half in halves] == [len(digests)] * 2


@pytest.mark.parametrize("kind", ["swapped", "moved", "negated", "transposed", "rolled"])
def test_what_a_plain_sum_would_not_notice(kind: str) -> None:
    weight = random(64, torch.float32).view(8, 8) - 50
    seen = {fingerprint([weight])[0]}
    variants = []
    for i in range(64):
        for j in range(i):
            changed = weight.clone()
            flat = changed.view(-1)
            if kind == "swapped":
                flat[i], flat[j] = weight.view(-1)[j], weight.view(-1)[i]
            elif kind == "moved":
                flat.view(torch.int32)[i] += 4096
                flat.view(torch.int32)[j] -= 4096
            elif kind == "negated":
                flat[i], flat[j] = -flat[i], -flat[j]
            elif kind == "transposed":
                changed = weight.roll(i, 0).roll(j, 1).t()
            else:
                changed = weight.view(-1).roll(64 * j + i) if i and j == 0 else weight + i + 64 * j
            variants.append(changed)
    digests = fingerprint(variants)
    distinct = {bytes_of(variant) for variant in variants}
    assert len(seen.union(digests)) == 1 + len(distinct)


def test_bits_of_the_sums_are_even() -> None:
    """Over zeros of growing length, each of the 128 bits is set about half of the time."""
    found = torch.cat(
        [
            reference.fingerprint([torch.zeros(8 * n)], [NO_INDEX], [torch.zeros(0)])
            for n in range(1, 801)
        ]
    )
    bits = torch.stack([(found >> b) & 1 for b in range(64)]).double().mean(1)
    assert float((bits - 0.5).abs().max()) < 0.1  # more than five standard deviations


def test_any_strides_and_alignment() -> None:
    matrix = random(60, torch.float32).view(6, 10)
    for view in (matrix.t(), matrix[:, 1:7], matrix.flatten()[1:], matrix.flatten()[3::2]):
        assert fingerprint([view]) == [by_definition(bytes_of(view))]
    assert fingerprint([]) == []


def test_the_tensor_is_not_changed() -> None:
    tensor, index = random(50, torch.float32), torch.tensor([3, 4, 49], dtype=torch.int32)
    before, version = tensor.clone(), tensor._version
    fingerprint([tensor], [index], [torch.zeros(3)])
    assert torch.equal(tensor, before)
    assert tensor._version == version


def test_wrong_arguments_are_named() -> None:
    tensor, index = torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="indices has 2 items, expected 1"):
        fingerprint([tensor], [index, index], [tensor[:1]])
    with pytest.raises(ValueError, match=r"indices\[0\] and originals\[0\] must be given together"):
        fingerprint([tensor], [index])
    with pytest.raises(TypeError, match=r"originals\[0\] torch\.float32, got .*float64"):
        fingerprint([tensor], [index], [torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="vectors of one length"):
        fingerprint([tensor], [index], [torch.zeros(2)])
    with pytest.raises(TypeError, match="at most 8 bytes"):
        fingerprint([torch.zeros(2, dtype=torch.complex128)])
    if native.available():
        with pytest.raises(ValueError, match=r"indices\[0\]: expected positions in 0\.\.3, got 4"):
            fingerprint([tensor], [index + 4], [tensor[:1]])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_card_gives_the_same_digits(dtype: torch.dtype) -> None:
    tensors = [random(n, dtype) for n in (0, 1, 999, 5000)]
    indices = [some_index(len(tensor)) for tensor in tensors]
    originals = [random(len(index), dtype, 3) for index in indices]
    on_card = [[t.cuda() for t in column] for column in (tensors, indices, originals)]
    assert fingerprint(*on_card) == fingerprint(tensors, indices, originals)
