"""Machine code is read as the tools print it, and occupancy follows the vendor's rules."""

from __future__ import annotations

import pytest

from bench.cards import resident_programs
from bench.machine_code import MachineCode, read_code

USAGE = " Function k:\n  REG:40 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:400 TEXTURE:0 SURFACE:0"


def read(*lines: str) -> MachineCode:
    return read_code(USAGE, "\n".join(f"        /*0{n:02x}0*/   {x}" for n, x in enumerate(lines)))


def test_resources() -> None:
    code = read("EXIT ;")
    assert (code.registers, code.local_bytes) == (40, 24)
    assert (code.load_bits, code.store_bits, code.tensor_core) == (0, 0, ())


@pytest.mark.parametrize(
    ("instruction", "bits"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000 */", 128),
        ("@!P0 LDG.E.64.CONSTANT R4, [R2.64] ;", 64),
        ("@P1 LDG.E R4, [R2.64] ;", 32),
        ("LDG.E.U16 R4, [R2.64] ;", 16),
        ("LDGSTS.E.BYPASS.128.ZFILL [R9], [R2.64], P1 ;", 128),
        ("@UP0 LDG.E.S8 R4, [R2.64] ;", 8),
        ("LDS.128 R4, [R2] ;", 0),
    ],
    ids=lambda x: x.split(" R")[0] if isinstance(x, str) else str(x),
)
def test_width_of_a_load(instruction: str, bits: int) -> None:
    code = read(instruction, "EXIT ;")
    assert code.load_bits == bits
    assert code.async_copies == ("LDGSTS" in instruction)
    assert code.stores == {}


def test_stores_copies_and_tensor_cores() -> None:
    code = read(
        "STG.E.128 desc[UR4][R2.64], R4 ;",
        "@P0 STG.E.U16 [R2.64], R4 ;",
        "UTMALDG.2D [UR8], [UR4] ;",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4].tnspA, R24 ;",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4 ;",
        "HFMA2 R4, R8, R12, R4 ;",
    )
    assert code.stores == {128: 1, 16: 1}
    assert code.tma_copies == 1
    assert code.tensor_core == ("HGMMA.64x256x16.F32.BF16", "HMMA.16816.F32.BF16")


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "expected"),
    [
        (80, 32, 0, 4, (16, "warps")),
        (80, 40, 0, 4, (12, "registers")),  # 65536 / (40 x 32, in portions of 256) = 51, 48 warps
        (80, 255, 0, 8, (1, "registers")),
        (86, 40, 0, 4, (12, "warps")),  # 48 warps
        (86, 32, 50_000, 4, (2, "shared")),  # 100 KB, 1 KB kept of each
        (90, 64, 73_728, 4, (3, "shared")),
        (90, 26, 0, 1, (32, "warps")),  # no more than 32 programs, whatever their size
    ],
)
def test_resident_programs(
    capability: int, registers: int, shared: int, warps: int, expected: tuple[int, str]
) -> None:
    assert resident_programs(capability, registers, shared, warps) == expected
