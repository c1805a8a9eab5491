"""The compiled module itself, and whether this installation has it."""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from pathlib import Path
from types import ModuleType


def _warn(problem: object) -> None:
    warnings.warn(
        f"the C++ module of spt_kernels cannot be loaded, and a CPU does without it, slowly: "
        f"{problem}; reinstall spt_kernels here, with a C++17 compiler",
        RuntimeWarning,
        stacklevel=2,
    )


def _of_another_python() -> list[str]:
    """Paths of modules that lie beside this package, where none of them is for this Python."""
    found = [*Path(__file__).parent.parent.glob("_native.*")]
    modules = [path for path in found if path.suffix in (".so", ".pyd")]
    own = {f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    return [] if any(path.name in own for path in modules) else [*map(str, modules)]


_native: ModuleType | None = None
_import_error: ImportError | None = None
try:
    _native = importlib.import_module("spt_kernels._native")
except ModuleNotFoundError as error:  # installed without a compiler, which is allowed
    _import_error = error
    if others := _of_another_python():
        _warn(f"this is Python {sys.version.split()[0]}, and of another one is {others[0]}")
except ImportError as error:  # it is there, and built for another system
    _import_error = error
    _warn(error)

# in the order of InstructionSet in csrc/instruction_set.h
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


def available() -> bool:
    """Whether the C++ module was built with this installation."""
    return _native is not None


def why_unavailable() -> str:
    """One sentence on what is missing, or the empty string."""
    if _native is not None:
        return ""
    return (
        f"the C++ module is not there ({_import_error}): reinstall spt_kernels with a C++17 "
        "compiler and without SPT_KERNELS_NO_NATIVE"
    )


def instruction_set() -> str:
    """Which code path runs on this processor: one of `INSTRUCTION_SETS`."""
    return INSTRUCTION_SETS[module().instruction_set()]


def limit_instruction_set(limit: str) -> None:
    """Use no better code path than `limit` in this process: for tests and benches."""
    module().limit_instruction_set(INSTRUCTION_SETS.index(limit))


def module() -> ModuleType:
    """The C++ module; whoever calls this has asked `available` before."""
    if _native is None:
        raise RuntimeError(why_unavailable())
    return _native
