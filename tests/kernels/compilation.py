"""Compiles kernel variants for cards that are not there, and reads off what they would occupy."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_kernels import kernels
from spt_kernels.kernels.variant import Variant

# compute capability -> shared memory that one block may use, in bytes (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability")
SHARED_BYTES_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Occupancy:
    """What a compiled kernel takes on the card, and how wide it reads.

    `local_bytes` is the thread's stack and local memory: anything above 0 is a register spill.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    load_bits: int


@dataclass(frozen=True)
class Failure:
    """Why a variant did not compile."""

    message: str


Key = tuple[str, str, int]  # kernels file, variant name, compute capability


def kernels_of(file: str) -> dict[str, Any]:
    """The kernels that one file defines, by name: jitted functions called `..._kernel`."""
    module = importlib.import_module(f"spt_kernels.kernels.{file}")
    return {
        name: value
        for name, value in vars(module).items()
        if name.endswith("_kernel") and getattr(value, "__module__", None) == module.__name__
    }


def kernel_files() -> list[str]:
    """Names of the files of `spt_kernels.kernels` that hold kernels."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [name for name in names if kernels_of(name)]


def variants_of(file: str) -> dict[str, Variant]:
    """The shipped variants of one kernels file, by name."""
    variants = importlib.import_module(f"spt_kernels.kernels.{file}").shipped_variants()
    by_name = {variant.name: variant for variant in variants}
    assert len(by_name) == len(variants), f"{file}: two variants share a name"
    return by_name


def compile_all(keys: Iterable[Key]) -> Mapping[Key, Occupancy | Failure]:
    """Compile every key, on all cores: Triton spends most of its time in LLVM and ptxas.

    Triton keeps what it compiled in its cache directory, so a second run is quick.
    """
    keys = list(keys)
    if len(keys) < 4:
        return {key: _compile(key) for key in keys}
    workers = min(os.cpu_count() or 1, 8)
    # spawned, not forked: the parent has torch's threads running
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(zip(keys, pool.map(_compile, keys), strict=True))


def _compile(key: Key) -> Occupancy | Failure:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file, name, capability = key
    variant = variants_of(file)[name]
    arguments = variant.kernel.arg_names
    _check_arguments(variant)
    signature = {
        argument: "constexpr" if argument in variant.constexprs else variant.signature[argument]
        for argument in arguments
    }
    attributes = {
        (arguments.index(argument),): [["tt.divisibility", 16]] for argument in variant.aligned
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    except Exception as error:  # whatever the compiler objects to is the finding
        return Failure(f"{type(error).__name__}: {error}")
    registers, local_bytes = _resource_usage(compiled.asm["cubin"])
    return Occupancy(
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=compiled.metadata.shared,
        load_bits=widest_load_bits(compiled.asm["ptx"]),
    )


def _check_arguments(variant: Variant) -> None:
    # a name that is missing, left over or doubly given would silently compile something else
    arguments = set(variant.kernel.arg_names)
    given = set(variant.signature) | set(variant.constexprs)
    assert given == arguments, f"{variant.name}: {sorted(given ^ arguments)} are not its arguments"
    assert not set(variant.signature) & set(variant.constexprs), f"{variant.name}: given twice"
    assert set(variant.aligned) <= set(variant.signature), f"{variant.name}: aligned a constexpr"


def widest_load_bits(ptx: str) -> int:
    """Bits of the widest load from global memory, be it plain or sm_80's asynchronous copy."""
    widths = [0]
    for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx):
        widths.append(int(vector or 1) * int(bits))
    for size in re.findall(
        r"cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", ptx
    ):
        widths.append(8 * int(size, 0))
    return max(widths)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory per thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def main() -> None:
    """Print what every variant occupies: `python -m tests.kernels.compilation [file ...]`."""
    files = sys.argv[1:] or kernel_files()
    keys = [(f, name, cc) for f in files for name in variants_of(f) for cc in SHARED_BYTES_LIMIT]
    print(f"{'variant':60} {'card':6} registers  local B  shared B  load bits")
    for (file, name, capability), found in compile_all(keys).items():
        row = f"{file + '-' + name:60} sm_{capability}"
        if isinstance(found, Failure):
            print(f"{row}  {found.message.splitlines()[0]}")
        else:
            print(
                f"{row}  {found.registers:9} {found.local_bytes:8} {found.shared_bytes:9}"
                f" {found.load_bits:10}"
            )


if __name__ == "__main__":
    main()
