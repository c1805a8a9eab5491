"""What a kernel's machine code says: how wide it reads and writes, and which units it uses."""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MachineCode:
    """One kernel as assembled.

    Attributes:
        registers: per thread.
        local_bytes: the thread's stack and local memory: anything above 0 is a register spill.
        loads: bits -> instructions that read as many of global memory per thread, asynchronous
            copies to shared memory included.
        stores: likewise for writes.
        async_copies: copies from global to shared memory that no register sees (`cp.async`), and
            those of the tensor memory accelerator.
        fences: waits for every access to memory that came before (`MEMBAR`).
        tensor_core: kinds of tensor-core instructions, e.g. `HMMA.16816.F32.BF16`; empty: none.
    """

    registers: int
    local_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    async_copies: int
    tma_copies: int
    fences: int
    tensor_core: tuple[str, ...]

    @property
    def load_bits(self) -> int:
        """The widest load."""
        return max(self.loads, default=0)

    @property
    def store_bits(self) -> int:
        """The widest store."""
        return max(self.stores, default=0)


def disassemble(cubins: Sequence[bytes], capability: int) -> list[MachineCode]:
    """Read compiled kernels of one card with the tools that Triton brings along."""
    if not cubins:
        return []
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def output_of(tool: str, *options: str, image: bytes) -> str:
        with tempfile.NamedTemporaryFile() as file:
            file.write(image)
            file.flush()
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usages = [output_of("cuobjdump", "--dump-resource-usage", image=cubin) for cubin in cubins]
    # the disassembler takes longer to start than to read, so it reads all kernels as one
    codes = [instructions_of(cubin) for cubin in cubins]
    ends = list(itertools.accumulate(map(len, codes)))
    architecture = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    lines: list[list[str]] = [[] for _ in cubins]
    sass = output_of("nvdisasm", "--binary", architecture, image=b"".join(codes))
    for line in sass.splitlines():
        if address := re.match(r"\s+/\*([0-9a-f]+)\*/", line):
            lines[bisect.bisect(ends, int(address[1], 16))].append(line)
    return [read_code(usage, "\n".join(own)) for usage, own in zip(usages, lines, strict=True)]


def instructions_of(cubin: bytes) -> bytes:
    """The code of the one kernel in a cubin, which is an ELF file of 64 bits."""
    assert cubin[:5] == b"\x7fELF\x02"
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    n_sections, names_section = struct.unpack_from("<HH", cubin, 0x3C)
    # of each section: where its name begins, where it begins, how long it is
    sections = [
        (
            struct.unpack_from("<I", cubin, at)[0],
            *struct.unpack_from("<QQ", cubin, at + 0x18),
        )
        for at in range(table, table + 64 * n_sections, 64)
    ]
    names_at = sections[names_section][1]
    (code,) = (
        cubin[begin : begin + size]
        for name, begin, size in sections
        if cubin.startswith(b".text.", names_at + name)
    )
    return code


def read_code(resource_usage: str, sass: str) -> MachineCode:
    """`disassemble` for the tools' output."""
    used = {n: int(v) for n, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", resource_usage)}
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", sass, re.M)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for operation in operations:
        name, *flags = operation.split(".")
        if name in ("LDG", "LDGSTS"):
            loads[_bits(flags)] += 1
        elif name == "STG":
            stores[_bits(flags)] += 1
    names = Counter(operation.split(".")[0] for operation in operations)
    matrix = {op for op in operations if op.split(".")[0] in ("HMMA", "HGMMA", "IMMA")}
    return MachineCode(
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        loads=dict(sorted(loads.items(), reverse=True)),
        stores=dict(sorted(stores.items(), reverse=True)),
        async_copies=names["LDGSTS"],
        tma_copies=names["UTMALDG"] + names["UBLKCP"],
        fences=names["MEMBAR"],
        tensor_core=tuple(sorted(matrix)),
    )


def _bits(flags: list[str]) -> int:
    """The width that an instruction's flags state; without one it is a word of 32 bits."""
    for flag in flags:
        if width := re.fullmatch(r"[US]?(8|16|64|128)", flag):
            return int(width[1])
    return 32
