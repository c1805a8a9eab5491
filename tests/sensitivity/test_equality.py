"""Sensitivities are equal when their scores are, and what they are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spt_kernels.sensitivity import Sensitivity, skewed_sensitivity
from tests.models import tiny_vit


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    made = skewed_sensitivity(tiny_vit())
    made.save(tmp_path / "s.safetensors")
    loaded = Sensitivity.load(tmp_path / "s.safetensors")
    assert loaded == made
    assert hash(loaded) == hash(made)


def test_other_scores_or_samples_are_not_equal() -> None:
    made = skewed_sensitivity(tiny_vit())
    name = next(iter(made))
    changed = made[name].clone()
    changed.view(-1)[0] += 1
    assert replace(made, scores={**made.scores, name: changed}) != made
    assert replace(made, num_samples=made.num_samples + 1) != made
    assert made != dict(made.scores), "a mapping of tensors alone does not say of what"
