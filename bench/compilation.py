"""Compiles every shipped variant of every kernel for cards that need not be there."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from spt_kernels import kernels
from spt_kernels.kernels.card import CAPABILITIES
from spt_kernels.kernels.variant import Variant

from .cards import MULTIPROCESSORS, resident_programs
from .machine_code import MachineCode, disassemble


@dataclass(frozen=True)
class Compiled:
    """A variant as one card would run it.

    Attributes:
        code: what its machine code says.
        shared_bytes: of shared memory per program.
        resident: programs that one multiprocessor holds at once.
        limited_by: what allows no more of them: `"warps"`, `"registers"` or `"shared"`.
        occupancy: warps that are then resident, of those that could be.
    """

    code: MachineCode
    shared_bytes: int
    resident: int
    limited_by: str
    occupancy: float


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


def keys_of(files: Iterable[str], capabilities: Iterable[int] = CAPABILITIES) -> list[Key]:
    """Everything that these files ship, for each of the cards."""
    cards = list(capabilities)
    return [
        (file, name, card)
        for file in files
        for name, variant in variants_of(file).items()
        for card in cards
        if variant.capability in (0, card)
    ]


def compile_all(keys: Iterable[Key]) -> Mapping[Key, Compiled | Failure]:
    """Compile every key, on all cores: Triton spends most of its time in LLVM and ptxas.

    Triton keeps what it compiled in its cache directory, so a second run is quick.
    """
    groups: dict[tuple[str, int], list[Key]] = {}
    for key in keys:
        groups.setdefault((key[0], key[2]), []).append(key)
    workers = min(os.cpu_count() or 1, 8)
    # spawned, not forked: the parent has torch's threads running
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        found = pool.map(compile_group, groups.values())
        return {key: one for group in found for key, one in group.items()}


def compile_group(keys: Sequence[Key]) -> Mapping[Key, Compiled | Failure]:
    """Compile, in this process, variants for one card."""
    (capability,) = {key[2] for key in keys}
    binaries: dict[Key, Any] = {}
    found: dict[Key, Compiled | Failure] = {}
    for key in keys:
        try:
            binaries[key] = to_binary(variants_of(key[0])[key[1]], capability)
        except Exception as error:  # whatever the compiler objects to is the finding
            found[key] = Failure(f"{type(error).__name__}: {error}")
    codes = disassemble([binary.asm["cubin"] for binary in binaries.values()], capability)
    for (key, binary), code in zip(binaries.items(), codes, strict=True):
        num_warps = variants_of(key[0])[key[1]].num_warps
        shared_bytes = binary.metadata.shared
        resident, limited_by = resident_programs(
            capability, code.registers, shared_bytes, num_warps
        )
        occupancy = resident * num_warps / MULTIPROCESSORS[capability].warps
        found[key] = Compiled(code, shared_bytes, resident, limited_by, occupancy)
    return {key: found[key] for key in keys}


def to_binary(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel: `asm` holds every stage of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _check_arguments(variant)
    arguments = variant.kernel.arg_names
    signature = {
        argument: "constexpr" if argument in variant.constexprs else variant.signature[argument]
        for argument in arguments
    }
    attributes = {
        (arguments.index(argument),): [["tt.divisibility", 16]] for argument in variant.aligned
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source, GPUTarget("cuda", capability, 32), options)


def _check_arguments(variant: Variant) -> None:
    # a name that is no argument, is given twice or has no type would compile something else
    parameters = {parameter.name: parameter for parameter in variant.kernel.params}
    unknown = (set(variant.types) | set(variant.constexprs)) - set(parameters)
    assert not unknown, f"{variant.name}: {sorted(unknown)} are not its arguments"
    assert not set(variant.types) & set(variant.constexprs), f"{variant.name}: given twice"
    for name, kind in variant.signature.items():
        assert not parameters[name].is_constexpr, f"{variant.name}: {name} has no value"
        assert name.endswith("_ptr") == kind.startswith("*"), f"{variant.name}: {name} is {kind}"
