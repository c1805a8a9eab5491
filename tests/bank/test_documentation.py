"""The Python blocks of docs/TASK_BANK.md, run as they stand, over a small ViT."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import spt_kernels as spt

from ..models import tiny_vit

PAGE = (Path(__file__).parents[2] / "docs" / "TASK_BANK.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the first block leaves, in a folder with its two files."""
    scores = {n: torch.rand_like(p) for n, p in tiny_vit().named_parameters() if "blocks" in n}
    sensitivity = spt.Sensitivity.from_tensors(scores, num_samples=1)
    for n, name in enumerate(("flowers", "pets")):
        tuned = spt.apply(tiny_vit(), spt.allocate(sensitivity, 200, None))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(n + 1)
        classes = [f"{name}{c}" for c in range(5)]
        spt.save_delta(tuned, tmp_path / f"{name}.safetensors", metadata={"classes": classes})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", small_model)
    monkeypatch.setattr(torch, "randn", small_images(torch.randn))
    found: dict[str, Any] = {}
    exec(BLOCKS[0], found)
    return found


def small_model(name: str, *, pretrained: bool) -> nn.Module:
    assert pretrained, name
    model = tiny_vit()
    model.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 1.0}  # type: ignore[assignment]
    return model


def small_images(randn: Any) -> Any:
    def made(*shape: Any, **how: Any) -> torch.Tensor:
        found: torch.Tensor = randn(*[16 if n == 224 else n for n in shape], **how)
        return found

    return made


def test_a_bank_its_switches_and_a_mixed_batch(names: dict[str, Any]) -> None:
    own = {
        name: spt.load_delta(tiny_vit(), f"{name}.safetensors").eval()
        for name in ("flowers", "pets")
    }
    with torch.no_grad():
        torch.testing.assert_close(names["logits"], own["flowers"](names["images"]))
        for i, name in enumerate(("flowers", "pets", "flowers")):
            alone = own[name](names["images"][i : i + 1])[0]
            torch.testing.assert_close(names["outputs"][i], alone, rtol=1e-4, atol=1e-4)
    exec(BLOCKS[1], names)
    with torch.no_grad():
        torch.testing.assert_close(names["logits"], own["pets"](names["images"]))
    assert names["bank"].in_use is None


def test_it_serves_requests_behind_fastapi(names: dict[str, Any]) -> None:
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    testclient = pytest.importorskip("fastapi.testclient")
    exec(BLOCKS[2], names)
    content = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 90)).save(content, "PNG")
    picture = {"content": content.getvalue(), "headers": {"content-type": "image/png"}}
    with testclient.TestClient(names["app"]) as client:
        for name in ("flowers", "pets"):
            answer = client.post(f"/tasks/{name}", **picture)
            assert answer.status_code == 200, answer.text
            assert answer.json()["class"].startswith(name)
        assert client.post("/tasks/birds", **picture).status_code == 404
        loaded = client.put("/tasks/birds", params={"path": "pets.safetensors"})
        assert loaded.json() == {"tasks": ["birds", "flowers", "pets"]}
        refused = client.put("/tasks/birds", params={"path": "nothing.safetensors"})
        assert refused.status_code == 422
