"""Imports run one way, each op has its mirrors, and no file grows past its purpose."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spt_kernels"

# Each line may import the lines above it, never one below or beside it.
ORDER = (
    ("__version__", "errors", "parameter_info", "replaced_head", "_native", "method"),
    ("atomic", "native"),
    ("reference", "kernels"),
    ("ops",),
    ("anatomy", "checked_file", "model_check", "plan_table", "selection"),
    ("plan",),
    ("layers", "per_sample"),
    ("sensitivity",),
    ("allocation", "synthetic_sensitivity"),
    ("tuning",),
    ("adamw_step", "method_plan"),
    ("prepared_step",),
    ("optim", "base_model", "task_file"),
    ("task",),
    ("delta", "memory_estimate", "memory_ledger", "memory_twin"),
    ("memory_cpu", "memory_cuda"),
    ("memory",),
    ("memory_fit",),
    ("figures", "environment"),
    ("finetuning",),
    ("costs",),
    ("cli",),
)
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Package-internal modules that `path` imports at run time, as parts below `spt_kernels`."""
    found: set[tuple[str, ...]] = set()
    package = path.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, *module)} if module else {(*base, n.name) for n in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spt_kernels"):
            found.add(tuple((node.module or "").split(".")[1:]))
    return {parts for parts in found if parts}


FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return  # the public face names everything
    for module in imports_of(path):
        if module[0] == own:
            continue
        assert RANK[module[0]] < RANK[own], f"{name_of(path)} imports {'.'.join(module)}"


def test_the_backends_do_not_know_each_other() -> None:
    for folder in ("reference", "kernels"):
        for path in (PACKAGE / folder).glob("*.py"):
            for module in imports_of(path):
                assert module[0] == folder, f"{name_of(path)} imports {'.'.join(module)}"


def test_every_op_has_its_mirrors() -> None:
    ops = {path.name for path in (PACKAGE / "ops").glob("*.py")}
    for folder in ("reference", "kernels"):
        missing = ops - {path.name for path in (PACKAGE / folder).glob("*.py")}
        assert not missing, f"{folder}/ lacks {sorted(missing)}"


def test_every_kernel_file_runs_in_the_interpreter() -> None:
    with_kernels = {
        p.stem for p in (PACKAGE / "kernels").glob("*.py") if "\n@triton.jit" in p.read_text()
    }
    tested = {p.stem for p in (Path(__file__).parent / "kernels" / "interpreter").glob("test_*.py")}
    assert with_kernels
    assert {f"test_{name}" for name in with_kernels} <= tested


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_owns(path: Path) -> None:
    text = path.read_text()
    opening = ast.get_docstring(ast.parse(text))
    assert opening, f"{name_of(path)} opens with no docstring"
    assert opening.splitlines()[0].endswith((".", ":")), f"{name_of(path)}: one sentence, please"
    assert text.count("\n") <= 400, f"{name_of(path)} is asking to be two files"
