"""The compiled module itself, and whether this installation has it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

_native: ModuleType | None = None
_import_error: ImportError | None = None
try:
    _native = importlib.import_module("spt_kernels._native")
except ModuleNotFoundError as error:  # installed without a compiler, which is allowed
    _import_error = error
except ImportError as error:  # it is there, and built for another system
    _import_error = error
    warnings.warn(
        f"the C++ module of spt_kernels cannot be loaded, and a CPU does without it, slowly: "
        f"{error}; reinstall spt_kernels here, with a C++17 compiler",
        RuntimeWarning,
        stacklevel=1,
    )

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
