"""Builds `spt_kernels._native` with CMake and Ninja; all metadata is in pyproject.toml."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
ESCAPE = "set SPT_KERNELS_NO_NATIVE=1 to install without the C++ module (CPU ops are then slower)"


class CMakeBuild(build_ext):
    """Runs CMake on csrc/ and leaves the module where setuptools looks for it."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        # what an earlier isolated build has cached names tools that are gone
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            *("-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        for command in (configure, [cmake, "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as failure:
                raise SystemExit(
                    f"spt_kernels: building the C++ module failed: {' '.join(command)} ended with "
                    f"code {failure.returncode}, see its messages above. You can {ESCAPE}."
                ) from None


def require_compiler() -> None:
    asked_for = os.environ.get("CXX")
    if asked_for:
        candidates: tuple[str, ...] = (asked_for.split()[0],)
    else:
        candidates = COMPILERS
    if not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            "spt_kernels: no C++ compiler found (looked for "
            f"{', '.join(candidates)}). Install one (on Debian or Ubuntu `apt install g++`), or "
            f"point CXX to yours, or {ESCAPE}."
        )


def tool(name: str, folder_attribute: str) -> str:
    """The program that the Python package of the same name brings, else the one on PATH.

    In an isolated build some of these packages name the folder of the surrounding environment,
    where the program is not; the one that belongs to the build is then on PATH.
    """
    try:
        folder = getattr(importlib.import_module(name), folder_attribute, None)
    except ImportError:
        folder = None
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not found:
        raise SystemExit(f"spt_kernels: {name} not found: `pip install {name}`, or {ESCAPE}.")
    return found


def extensions() -> list[Extension]:
    if os.environ.get("SPT_KERNELS_NO_NATIVE") == "1":
        return []
    csrc = ROOT / "csrc"
    files = sorted(str(path.relative_to(ROOT)) for path in csrc.rglob("*") if path.is_file())
    sources = [path for path in files if path.endswith(".cpp")]
    # `depends` is rebuilt for when changed, and brought along in an sdist
    depends = [path for path in files if path not in sources]
    return [Extension("spt_kernels._native", sources=sources, depends=depends)]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
