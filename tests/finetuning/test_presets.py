"""Published recipes: what each says, and that the values, not the name, make a job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spt_kernels.finetuning import (
    PRESETS,
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Preprocessing,
    Recipe,
    preset_of,
)
from spt_kernels.methods import METHODS

BASE = ModelSource("vit_base_patch16_224", pretrained=True)


def test_the_defaults_of_the_package_are_the_papers_on_vtab() -> None:
    preset = preset_of("paper")
    assert replace(preset.recipe, preset=None) == Recipe()
    assert preset.method("spt-adapter") == Method("spt-adapter")


def test_the_published_code_is_as_its_commands_say() -> None:
    preset = preset_of("published-code")
    recipe, method = preset.recipe, preset.method("spt-lora", budget=400_000)
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (100, 64, 1e-4)
    assert recipe.peak_lr(method) == 1e-3
    assert recipe.lr_factor(0, 13) * 1e-3 == pytest.approx(1e-6)
    assert method == Method("spt-lora", 400_000, samples=512, rule="published-code")
    assert preset.form["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_takes_of_a_preset_what_it_reads(name: str) -> None:
    preset = preset_of(name)
    assert preset.recipe.preset == name
    Preprocessing(**{"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3, **preset.form})
    for entry in METHODS:
        assert preset.method(entry.replace("-K", "-4")).name.startswith(entry.rstrip("K"))
    assert preset.method("spt-lora", samples=7).samples == 7


def test_a_preset_is_in_the_job_by_name_and_only_its_values_count() -> None:
    preset = preset_of("paper")
    job = FinetuneJob(BASE, ImageSource("data"), preset.method(), preset.recipe, preset.form)
    again = FinetuneJob.from_json(job.to_json())
    assert again.recipe.preset == "paper"
    assert again.difference_from(job) is None
    assert replace(job, recipe=Recipe()).difference_from(job) is None
    other = replace(job, recipe=preset_of("published-code").recipe)
    assert other.difference_from(job) == "schedule was step, is epoch"


def test_an_unknown_preset_or_an_option_that_a_method_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe: expected one of paper, paper-fgvc, .* 'noah'"):
        preset_of("noah")
    with pytest.raises(ValueError, match="samples: method 'linear' has none"):
        preset_of("paper").method("linear", samples=5)
