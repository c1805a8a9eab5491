"""Imports run one way along the stages, each op has its mirrors, no file outgrows its purpose."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "spt_kernels"

# The line in which data flows: a stage imports those before it, never one after it.
STAGES = (
    *("model", "sensitivity", "plan", "layers", "recomputation", "approximation", "tuning"),
    *("optim", "offloading", "step", "task", "bank", "peft", "methods", "memory", "fitting"),
    *("finetuning", "segmentation", "benchmarks", "plots", "costs", "cli"),
)
# The same within a stage: a folder imports those before it, and files beside it that need none.
LINES = {
    "layers": ("deltas", "autograd"),
    "finetuning": (
        *("folder", "images", "base", "job"),
        *("training", "run", "preparation", "results"),
    ),
}
# Beside those before it, what any stage imports. The grid of ops it reaches through `ops`.
ANY_STAGE = {"ops", "files", "distributed", "errors", "__version__"}
# Of files that are about the grid itself: what they import of it besides, and why.
BESIDES_OF_FILE = {
    "memory/work.py": {"gradient_ways"},  # counts what a card would launch, without one
    "costs/machine.py": {"native"},  # tells a result's instruction set
    "costs/rate_fit.py": {"gradient_ways"},  # fits the rates that ways are chosen by,
    "costs/rate_store.py": {"gradient_ways"},  # stores them
    "costs/way_times.py": {"gradient_ways", "kernels"},  # and times the ways one by one
    "cli/bench_tune.py": {"gradient_ways"},  # shows them
}
# What each folder of the grid of ops, and each file at the root, imports.
BESIDES = {
    "errors": set(),
    "_native": set(),
    "__version__": set(),
    "files": {"errors"},
    "distributed": {"errors"},
    "native": {"_native"},
    "reference": set(),
    "gradient_ways": set(),
    "kernels": {"gradient_ways"},
    "ops": {"distributed", "errors", "reference", "gradient_ways", "kernels", "native"},
    "environment": {"native", "layers"},
    "__main__": {"cli"},
}
# The ops that have no file in a folder of views, and the files of each folder that are no op's.
WITHOUT = {
    "reference": {"shared_top_tau"},
    "kernels": {"shared_top_tau"},
    "native": {"shared_top_tau", "encode_derivative", "sparse_norm_grad"},
}
OF_NO_OP = {
    "ops": {"__init__", "dtypes", "launching", "native_calls", "torch_internals"},
    "reference": set(),
    "kernels": {
        *("card", "variant", "prepared_launch", "address_table"),  # of launches
        *("take", "transpose", "token_split"),  # steps of several
        "adamw_plan",  # sparse_adamw from step to step
        "sampled_tiles",  # of sparse_weight_grad
        *("squared_products", "squared_vector_grad"),  # of squared_grad
    },
    "native": {"activation", "layout", "module"},
    "csrc": {
        *("bindings", "instruction_set", "team"),
        "activation",  # inputs made on the way, of sparse_weight_grad and low_rank
        *("weight_grad_kernels", "weight_grad_pack", "weight_grad_plan", "weight_grad_sample"),
    },
}
ROOT_FILES = {"__init__.py", "__main__.py", "errors.py", "environment.py", "py.typed"}


@functools.cache
def read(path: Path) -> tuple[str | None, set[tuple[str, ...]]]:
    """A file's docstring, and what it imports of the package, as parts below `spt_kernels`."""
    found: set[tuple[str, ...]] = set()
    package = path.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, *module)} if module else {(*base, n.name) for n in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spt_kernels"):
            found.add(tuple((node.module or "").split(".")[1:]))
        elif isinstance(node, ast.Import):
            names = [n.name.split(".") for n in node.names]
            found |= {tuple(parts[1:]) for parts in names if parts[0] == "spt_kernels"}
    return ast.get_docstring(tree), {parts for parts in found if parts}


FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def allowed(path: Path) -> set[str]:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own not in STAGES:
        return {own, *BESIDES[own]}
    besides = BESIDES_OF_FILE.get(path.relative_to(PACKAGE).as_posix(), set())
    return {own, *STAGES[: STAGES.index(own)], *ANY_STAGE, *besides}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return  # the public face names everything
    for module in read(path)[1]:
        assert module[0] in allowed(path), f"{name_of(path)} imports {'.'.join(module)}"


def test_each_exception_is_needed() -> None:
    for name, besides in BESIDES_OF_FILE.items():
        assert besides <= {module[0] for module in read(PACKAGE / name)[1]}, name


@pytest.mark.parametrize("stage", LINES)
def test_the_folders_of_a_stage_are_a_line(stage: str) -> None:
    line, files = LINES[stage], sorted((PACKAGE / stage).rglob("*.py"))
    own = {path: path.relative_to(PACKAGE).parts[1] for path in files}  # folder, or the file itself
    needed = {path: {m[1] for m in read(path)[1] if m[0] == stage and m[1:]} for path in files}
    ground = {p.stem for p in files if own[p] not in line and not needed[p] & set(line)}
    assert set(line) == {folder for folder in own.values() if not folder.endswith(".py")}
    for path in files:
        if own[path] in line:
            before = {*line[: line.index(own[path]) + 1], *ground}
            assert needed[path] <= before, f"{name_of(path)} imports {needed[path] - before}"


def test_the_root_shows_the_line_of_data() -> None:
    present = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_native.")}
    folders = {name for name in {*STAGES, *BESIDES} if (PACKAGE / name).is_dir()}
    assert set(STAGES) <= folders
    assert present - {"__pycache__"} == ROOT_FILES | folders


def test_no_file_imports_in_a_circle() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in FILES}
    modules = {p[:-1] if p[-1] == "__init__" else p: path for p, path in modules.items()}
    del modules[()]  # the public face loads on demand
    graph = {
        own: {t for m in read(path)[1] if (t := m if m in modules else m[:-1]) in modules}
        for own, path in modules.items()
    }
    state: dict[tuple[str, ...], str] = {}

    def visit(module: tuple[str, ...], path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " → ".join((*path, ".".join(module)))
        if module in state:
            return
        state[module] = "open"
        for other in sorted(graph[module]):
            if other != module[: len(other)]:  # not the folder that it is in
                visit(other, (*path, ".".join(module)))
        state[module] = "done"

    for module in sorted(graph):
        visit(module, ())


def ops() -> set[str]:
    """Every op; a file `op_more` belongs to `op`, and is none."""
    names = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - OF_NO_OP["ops"]
    return {name for name in names if not belongs(name, names - {name})}


def belongs(name: str, owners: set[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}_") for owner in owners)


@pytest.mark.parametrize("folder", ["reference", "kernels", "native"])
def test_every_op_has_its_views(folder: str) -> None:
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    assert ops() - files == WITHOUT[folder]
    strangers = {name for name in files if not belongs(name, ops())}
    assert strangers == OF_NO_OP[folder]


def test_each_file_of_cpp_is_an_ops_or_a_named_one() -> None:
    sources = {path.stem for path in (PACKAGE.parent / "csrc").glob("*.cpp")}
    views = {path.stem for path in (PACKAGE / "native").glob("*.py")} & ops()
    assert views <= sources
    assert {name for name in sources if not belongs(name, ops())} == OF_NO_OP["csrc"]
    assert sources & ops() == views


def test_the_table_of_ops_says_which_views_each_has() -> None:
    page = (PACKAGE.parent / "docs" / "KERNELS.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == ops()
    assert {name for name, card, _ in rows if "Triton" not in card} == WITHOUT["kernels"]
    assert {name for name, _, cpu in rows if "C++" not in cpu} == WITHOUT["native"]


def test_every_kernel_file_runs_in_the_interpreter() -> None:
    with_kernels = {
        p.stem for p in (PACKAGE / "kernels").glob("*.py") if "\n@triton.jit" in p.read_text()
    }
    tested = {p.stem for p in (TESTS / "kernels" / "interpreter").glob("test_*.py")}
    assert with_kernels
    assert {f"test_{name}" for name in with_kernels} <= tested


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    tested = {path.name for path in TESTS.iterdir() if list(path.glob("test_*.py"))}
    # the reference is what every op is tested against; card, bench and docs are no folders of it
    assert tested - {"card", "bench", "docs"} == folders - {"reference"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_owns(path: Path) -> None:
    opening, _ = read(path)
    assert opening, f"{name_of(path)} opens with no docstring"
    assert opening.splitlines()[0].endswith((".", ":")), f"{name_of(path)}: one sentence, please"
    assert path.read_text().count("\n") <= 400, f"{name_of(path)} is asking to be two files"


# What of torch's own others than `ops/torch_internals.py` take: fake tensors, and calls on many
# tensors, as torch's optimizers make them.
PRIVATE_OF_TORCH = re.compile(r"torch\.(_subclasses\.fake_tensor|_foreach_\w+)$")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_private_of_torch_is_taken_in_one_place(path: Path) -> None:
    if name_of(path) == "ops/torch_internals.py":
        return
    used = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            used.add(f"{node.module}")
            used |= {f"{node.module}.{name.name}" for name in node.names if name.name[0] == "_"}
        elif isinstance(node, ast.Import):
            used |= {name.name for name in node.names if name.name.startswith("torch.")}
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
    own = {name for name in used if re.match(r"torch\._[^_]", name)}
    assert {name for name in own if not PRIVATE_OF_TORCH.match(name)} == set()


def test_the_dtypes_of_the_ops_are_written_once() -> None:
    three = re.compile(
        r"\(torch\.(float32|bfloat16|float16)(, torch\.(float32|bfloat16|float16)){2}\b"
    )
    files = {name_of(path) for path in FILES if three.search(path.read_text("utf-8"))}
    assert files == {"ops/dtypes.py", "task/delta.py"}  # and those of a format


def test_text_is_read_and_written_as_utf_8_in_any_locale() -> None:
    bare = re.compile(r"\.read_text\(\)|\.write_text\((?!.*encoding=)")
    files = [path for path in FILES if bare.search(path.read_text("utf-8"))]
    assert files == []
