"""The blocks of docs/PEFT.md, run one after another as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft.tuners.lora import LoraModel

DOCS = Path(__file__).parents[2] / "docs" / "PEFT.md"


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    kinds = []
    for block in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
        kinds.append(type(getattr(names["model"], "base_model", None)))
    assert len(kinds) == 7
    assert [kind is LoraModel for kind in kinds] == [False] * 5 + [True, False]
    assert {"flowers", "again", "lora", "shira"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "shira.safetensors").stat().st_size > 0
    assert {type(m).__module__.partition(".")[0] for m in names["plain"].modules()} == {
        "torch",
        "transformers",
    }
