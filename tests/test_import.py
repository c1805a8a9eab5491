"""`import spt_kernels` is fast, and works without GPU, Triton or the compiled module."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_loads_neither_torch_nor_triton() -> None:
    heavy = "{'torch', 'triton', 'timm', 'matplotlib', 'rich', 'typer'}"
    assert run(f"import sys, spt_kernels; print({heavy} & set(sys.modules))").strip() == "set()"


def test_every_public_name_resolves_whatever_is_imported_first() -> None:
    each = (
        "import spt_kernels as spt; [getattr(spt, name) for name in spt.__all__]",
        "import spt_kernels as spt; [getattr(spt.ops, name) for name in spt.ops.__all__]",
        "import spt_kernels.ops.top_tau; import spt_kernels as spt; spt.ops.top_tau([], 0)",
    )
    # torch is loaded once, and whatever is under test by each child for itself
    run(
        "import os, torch\n"
        f"for code in {each!r}:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        exec(code)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, code\n"
    )


def test_unknown_name_is_an_attribute_error() -> None:
    run("import spt_kernels\ntry: spt_kernels.nonsense\nexcept AttributeError as e: print(e)")


@pytest.mark.parametrize("absent", ["triton", "spt_kernels._native"])
def test_works_without(absent: str) -> None:
    out = run(
        f"import sys; sys.modules[{absent!r}] = None\n"
        "import torch, spt_kernels as spt\n"
        "print(spt.ops.top_tau([torch.tensor([1.0, 3.0, 2.0])], 2))\n"
        "print(spt.backends())"
    )
    assert "tensor([1, 2])" in out
    assert "absent" in out


def test_a_kernel_without_triton_says_what_to_install() -> None:
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "try: from spt_kernels.kernels import top_tau\n"
        "except ImportError as error: print(error)"
    )
    assert "needs Triton" in out
    assert "pip install triton" in out


def test_matplotlib_is_loaded_only_for_drawing() -> None:
    drawing = ["plan.figure", "memory.figure", "costs.drawing", "plots"]
    files = ", ".join(f"spt_kernels.{name}" for name in drawing)
    assert run(f"import sys, {files}; print('matplotlib' in sys.modules)").strip() == "False"
