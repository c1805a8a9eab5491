"""`import spt_kernels` is fast, and works without GPU, Triton or the compiled module."""

from __future__ import annotations

import ast
import importlib.metadata
import operator
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import spt_kernels as spt
from spt_kernels import native
from spt_kernels.layers.autograd import graph_nodes


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_each(*codes: str) -> None:
    """Each for itself, in a child of a process that has loaded torch and nothing of ours."""
    run(
        "import os, torch\n"
        f"for code in {codes!r}:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        exec(code)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, code\n"
    )


def test_importing_loads_neither_torch_nor_triton() -> None:
    heavy = "{'torch', 'triton', 'timm', 'matplotlib', 'rich', 'typer'}"
    assert run(f"import sys, spt_kernels; print({heavy} & set(sys.modules))").strip() == "set()"


def test_what_is_imported_first_or_absent_makes_no_difference() -> None:
    each = (
        "import spt_kernels as spt; [getattr(spt, name) for name in spt.__all__]",
        "import spt_kernels as spt; [getattr(spt.ops, name) for name in spt.ops.__all__]",
        "import spt_kernels.ops.top_tau; import spt_kernels as spt; spt.ops.top_tau([], 0)",
    )
    without = (
        "import sys; sys.modules[{!r}] = None\n"
        "import spt_kernels as spt\n"
        "assert spt.ops.top_tau([torch.tensor([1.0, 3.0, 2.0])], 2)[0].tolist() == [1, 2]\n"
        "assert 'absent' in str(spt.backends())\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
        "scores = {{'0.weight': torch.arange(16.0).view(4, 4)}}\n"
        "plan = spt.allocate(spt.Sensitivity.from_tensors(scores, num_samples=1), budget=3)\n"
        "assert spt.estimate_memory(model, (2, 4), plan=plan).peak_bytes"
    )
    run_each(*each, *(without.format(absent) for absent in ("triton", "spt_kernels._native")))


def test_a_compiled_module_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    """In one warning; then the package does without, as where there is none."""
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"of another system")
    run(
        "import importlib.util, sys, warnings\n"
        "class Broken:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'spt_kernels._native':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(broken)!r})\n"
        "sys.meta_path.insert(0, Broken)\n"
        "import torch, spt_kernels as spt\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    assert spt.ops.top_tau([torch.ones(2)], 1)[0].tolist() == [0]\n"
        f"[warning] = [str(w.message) for w in seen if {str(broken)!r} in str(w.message)]\n"
        "assert 'C++ module of spt_kernels cannot be loaded' in warning\n"
        "assert 'reinstall' in str(spt.backends())\n"
    )


@pytest.mark.skipif(not native.available(), reason="there is no compiled module")
def test_a_compiled_module_of_another_python_is_told() -> None:
    run(
        "import importlib.machinery, sys, warnings\n"
        "sys.modules['spt_kernels._native'] = None\n"
        "importlib.machinery.EXTENSION_SUFFIXES[:] = ['.cpython-39-x86_64-linux-gnu.so']\n"
        "import torch, spt_kernels as spt\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    assert spt.ops.top_tau([torch.ones(2)], 1)[0].tolist() == [0]\n"
        "[warning] = [str(w.message) for w in seen if 'C++ module' in str(w.message)]\n"
        "assert f'this is Python {sys.version.split()[0]}, and of another one is' in warning\n"
    )


def test_unknown_name_is_an_attribute_error() -> None:
    run("import spt_kernels\ntry: spt_kernels.nonsense\nexcept AttributeError as e: print(e)")


def test_a_kernel_without_triton_says_what_to_install() -> None:
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "try: from spt_kernels.kernels import top_tau\n"
        "except ImportError as error: print(error)"
    )
    assert "needs Triton" in out
    assert "pip install triton" in out


def test_triton_may_have_been_installed_under_another_name(monkeypatch) -> None:
    triton = pytest.importorskip("triton")

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert spt.backends().triton == triton.__version__


def test_a_torch_that_tells_nothing_of_what_is_kept_is_named(monkeypatch) -> None:
    """There inputs are kept, not made again: of 2.9 nodes say nothing of hooks."""
    assert spt.backends().rebuilding == "available"
    monkeypatch.setattr(graph_nodes, "hook_of", operator.attrgetter("is_not_there"))
    found = spt.backends()
    assert found.rebuilding is None
    assert f"rebuilding absent: torch {torch.__version__} does not tell" in str(found)


def test_matplotlib_is_imported_where_something_is_drawn() -> None:
    package = Path(__file__).parent.parent / "spt_kernels"
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    files = {path: ast.parse(text) for path, text in texts.items() if "matplotlib" in text}
    drawing = {path for path, tree in files.items() if "matplotlib" in imported(ast.walk(tree))}
    assert len(drawing) > 5
    for path in drawing:
        assert "matplotlib" not in imported(files[path].body), path


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Packages that some statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}
