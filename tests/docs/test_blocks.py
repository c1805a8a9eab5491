"""Every Python block of every page runs, one after another, as a reader would paste them.

A block with `title="a reason"` behind its language is not run; what it imports must be there. A
page that needs more, as several processes, may be run by a test beside its subject instead.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from spt_kernels.finetuning.demo import one_thread
from tests.docs import standins
from tests.docs.pages import EXAMPLES, PAGES, ROOT, Block, blocks_of

TESTS = ROOT / "tests"
RUN_ELSEWHERE = "\n".join(
    text
    for path in TESTS.rglob("*.py")
    if TESTS / "docs" not in path.parents and "exec(" in (text := path.read_text())
)
WITH_PYTHON = [
    page
    for page in (*PAGES, EXAMPLES)
    if any(block.language == "python" for block in blocks_of(page))
    and f'"{page.name}"' not in RUN_ELSEWHERE
]


def imports_of(block: Block) -> str:
    """The lines of a block that import."""
    found = [
        n for n in ast.walk(ast.parse(block.text)) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    return "\n".join(ast.unparse(node) for node in found)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    standins.shrink(monkeypatch)
    torch.manual_seed(0)
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    assert any(block.reason is None for block in blocks) or len(blocks) == 1, "nothing is run"
    text = "".join(block.text for block in blocks)
    for name, write in standins.FILES.items():
        if f'"{name}"' in text and f'save_delta(model, "{name}")' not in text:
            write(tmp_path / name)

    with one_thread():
        names = standins.names()
        for block in blocks:
            code = imports_of(block) if block.reason else block.text
            for name, make in standins.MADE.items():  # anew, unless the page has made its own
                if name in code and names.get(name) is names.get(f"given {name}"):
                    names[name] = names[f"given {name}"] = make(names)
            try:
                exec(compile(code, f"{page.name}", "exec"), names)
            except ModuleNotFoundError as error:
                package = (error.name or "").partition(".")[0]
                if package in ("spt_kernels", "tests", "bench"):
                    raise
                pytest.skip(f"{package} is not installed")


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# A\n\n```python\nx = 1\n```\n\n```python title="why"\nx.y\n```\n\n```sh\nls\n```\n'
    )
    assert [(b.language, b.reason) for b in blocks_of(page)] == [
        ("python", None),
        ("python", "why"),
        ("sh", None),
    ]
