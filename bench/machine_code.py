"""What a kernel's machine code says: how wide it reads and writes, and which units it uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
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
        tensor_core: kinds of tensor-core instructions, e.g. `HMMA.16816.F32.BF16`; empty: none.
    """

    registers: int
    local_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    async_copies: int
    tma_copies: int
    tensor_core: tuple[str, ...]

    @property
    def load_bits(self) -> int:
        """The widest load."""
        return max(self.loads, default=0)

    @property
    def store_bits(self) -> int:
        """The widest store."""
        return max(self.stores, default=0)


def disassemble(cubin: bytes) -> MachineCode:
    """Read a compiled kernel with the tools that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = [
            subprocess.run(
                [str(tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    return read_code(*found)


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
        tensor_core=tuple(sorted(matrix)),
    )


def _bits(flags: list[str]) -> int:
    """The width that an instruction's flags state; without one it is a word of 32 bits."""
    for flag in flags:
        if width := re.fullmatch(r"[US]?(8|16|64|128)", flag):
            return int(width[1])
    return 32
