"""Profiles of steps: what they hold, and that what is there already is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import step_profiles

SIZES = ["--model", "vit_tiny_patch16_224", "--batch-size", "2", "--device", "cpu"]
for size in ("img_size=32", "patch_size=8", "depth=1", "embed_dim=48"):
    SIZES += ["--model-arg", size]


def test_a_methods_profile_is_kept_and_others_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profiles.json"
    arguments = ["--output", str(file), "--dtype", "fp32", *SIZES]
    monkeypatch.setattr(step_profiles, "METHODS", ("linear",))
    assert step_profiles.main(arguments) == 0
    linear = json.loads(file.read_text())["methods"]["linear"]
    assert linear["ms"]["median_ms"] > 0
    assert linear["operators"] > 10
    assert linear["kernels"] == 0
    names = [name for name, _, _ in linear["top_us"]]
    assert "aten::addmm" in names
    assert any("forward" in function for function, _, _ in linear["host"])
    assert "linear: " in capsys.readouterr().out

    measured = []

    def remember(name: str, setting: Any) -> dict[str, Any]:
        measured.append(name)
        if name == "bias":
            raise ValueError("not here")
        return linear

    monkeypatch.setattr(step_profiles, "profiled", remember)
    monkeypatch.setattr(step_profiles, "METHODS", ("linear", "bias", "full"))
    assert step_profiles.main(arguments) == 1  # one of them failed
    assert measured == ["bias", "full"]
    assert set(json.loads(file.read_text())["methods"]) == {"linear", "full"}
    # of another precision nothing is known
    assert step_profiles.main([*arguments, "--dtype", "bf16"]) == 1
    assert measured == ["bias", "full", "linear", "bias", "full"]
