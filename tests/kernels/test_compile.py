"""Every shipped kernel variant compiles ahead of time, for three generations of cards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import spt_kernels.ops
from bench import compilation
from bench.cards import MULTIPROCESSORS
from bench.compilation import (
    Compiled,
    Failure,
    Key,
    compile_group,
    kernel_files,
    kernels_of,
    keys_of,
    to_binary,
    variants_of,
)
from spt_kernels.kernels.variant import Variant

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET=1: kernels are not compiled")

# of one card after another: those of a group are compiled, and read, together
KEYS: list[Key] = [] if interpreted else sorted(keys_of(kernel_files()), key=lambda key: key[2])
# A card's disassembler takes longer to start than to read one; and of a group that two processes
# share, each compiles all of it
_OF_A_GROUP = 24
GROUPS: dict[Key, tuple[int, int]] = {key: (key[2], n // _OF_A_GROUP) for n, key in enumerate(KEYS)}

TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
# eight bytes, once a sample and not in the loop over its tokens
SPILLED_BEFORE_3_7: Key = ("squared_vector_grad", "vector-fp32-input", 80)


Compilations = Callable[[Key], Compiled | Failure]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Compilations:
    """What a variant is compiled to, together with those of its group that are asked for."""
    own = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["key"] for item in own if hasattr(item, "callspec")}

    @cache
    def group(number: tuple[int, int]) -> Mapping[Key, Compiled | Failure]:
        return compile_group([key for key in KEYS if key in asked and GROUPS[key] == number])

    return lambda key: group(GROUPS[key])[key]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]}-{key[1]}-sm_{key[2]}")
def test_variant_compiles_fits_and_uses_the_units_of_its_card(
    key: Key, compiled: Compilations
) -> None:
    file, name, capability = key
    variant, found = variants_of(file)[name], compiled(key)

    assert not isinstance(found, Failure), found.message
    if not (key == SPILLED_BEFORE_3_7 and TRITON < (3, 7)):
        assert found.code.local_bytes == 0, f"registers spill: {found}"
    assert found.shared_bytes <= MULTIPROCESSORS[capability].shared_bytes_per_program, str(found)
    assert found.code.load_bits >= variant.load_bits, f"narrow loads: {found}"
    assert found.code.store_bits >= variant.store_bits, f"narrow stores: {found}"
    assert found.resident >= max(1, variant.programs_per_sm), f"fewer than counted on: {found}"

    source = Path(str(variant.kernel.fn.__code__.co_filename)).read_text()
    if "tl.dot" not in source or name.startswith("vector"):
        assert found.code.tensor_core == ()
        return
    unit = "HGMMA" if capability >= 90 and not variant.is_thin else "HMMA"
    assert not (variant.is_thin and found.code.fences), "nothing can be read ahead of a fence"
    assert {operation.split(".")[0] for operation in found.code.tensor_core} == {unit}
    assert all(".F32" in operation for operation in found.code.tensor_core), "sums are in fp32"
    assert found.code.async_copies > 0 or variant.num_stages == 1


def test_kernels_are_read_at_once_as_each_alone_and_one_that_fails_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [key for key in KEYS if (key[0], key[2]) == ("transpose", 90)]
    together = compile_group(keys)
    assert {key: compile_group([key])[key] for key in keys[-2:]}.items() <= together.items()

    def first_fails(variant: Variant, capability: int) -> Any:
        if variant.name == keys[0][1]:
            raise ValueError("no code")
        return to_binary(variant, capability)

    monkeypatch.setattr(compilation, "to_binary", first_fails)
    found = compile_group(keys[:2])
    assert list(found.items()) == [
        (keys[0], Failure("ValueError: no code")),
        (keys[1], together[keys[1]]),
    ]


def test_no_kernel_is_left_out() -> None:
    files = kernel_files()
    of_ops = Path(spt_kernels.ops.__path__[0]).glob("*.py")
    ops = {path.stem for path in of_ops if "torch.library.define" in path.read_text()}
    for op in ops:  # in a file of its name, or in several whose names begin with it
        assert any(f"{file}_".startswith(f"{op}_") for file in files), op
    for file in files:
        shipped = {variant.kernel.__name__ for variant in variants_of(file).values()}
        assert shipped == set(kernels_of(file)), file


def test_every_card_is_served() -> None:
    for file in kernel_files():
        served = {
            card: {
                v.name.split("-sm_")[0]
                for v in variants_of(file).values()
                if v.capability in (0, card)
            }
            for card in MULTIPROCESSORS
        }
        assert len({frozenset(names) for names in served.values()}) == 1, file
