"""That a model and the images do not go together is found out before the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, build
from spt_kernels.finetuning.base.model_check import check_scores
from spt_kernels.finetuning.base.models import build_empty
from spt_kernels.finetuning.run.setting import open_setting
from tests.models import tiny_convnext, tiny_swin, tiny_vit

from .pictures_on_disk import TINY, write_images, write_weights


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin, tiny_convnext])
def test_a_classifier_passes_and_draws_nothing(make: Any) -> None:
    model = make().eval()
    state = torch.get_rng_state()
    size = 16 if make is tiny_vit else 32
    side = getattr(getattr(model, "patch_embed", None), "img_size", (size, size))[0]
    check_scores(model, (3, side, side), 5)
    assert torch.equal(state, torch.get_rng_state())


class Answers(nn.Module):
    """Gives something of its own, whatever it sees."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, image: Tensor) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 4), "one score per class, 1 × 3, and gives 1 × 4"),
        (torch.zeros(1, 9, 3), "gives 1 × 9 × 3"),
        ([torch.zeros(1, 3)], "gives a list"),
        ({"logits": torch.zeros(1, 3)}, "gives a dict"),
    ],
)
def test_what_is_no_score_per_class_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_scores(Answers(given), (3, 16, 16), 3)


def test_images_that_a_model_does_not_take_are_refused() -> None:
    model = tiny_vit().eval()
    with pytest.raises(
        ValueError, match=r"mean: expected one value per channel that Vision.* takes, 3, got 1"
    ):
        check_scores(model, (1, 16, 16), 5)
    with pytest.raises(ValueError, match="image_size: VisionTransformer cannot take images of 3 ×"):
        check_scores(model, (3, 24, 24), 5)


@pytest.mark.parametrize("make", [build, build_empty])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": "six"}, "cannot be built with depth='six'"),
        ({"num_heads": 0}, "cannot be built with num_heads=0"),
        ({"depth": -1}, "cannot be built with depth=-1"),
        ({"act_layer": "no"}, "with act_layer='no': there is no 'no'"),
        ({"deep": 3}, "cannot be built with deep=3"),
        ({"num_classes": 9}, "num_classes=9 is not the number of classes, 3"),
        ({"features_only": True}, "a score per class"),
        ({"pretrained": True}, "say `pretrained` itself"),
        ({"checkpoint_path": "x.pth"}, "name the file as `weights`"),
    ],
)
def test_arguments_that_cannot_be_are_named(make: Any, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"^model_arg: .*{words}"):
        make(ModelSource("vit_tiny_patch16_224", {**TINY, **change}), 3)


def test_the_number_of_classes_may_be_said_again() -> None:
    build_empty(ModelSource("vit_tiny_patch16_224", {**TINY, "num_classes": 3}), 3)


def test_few_images_are_told(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train", {"blue": 5, "green": 1, "red": 2})
    base = write_weights(tmp_path / "base.safetensors")
    source = ImageSource(str(tmp_path / "data"), val_share=0.0)
    job = FinetuneJob(base, source, Method("linear"), Recipe(batch_size=64))
    notes = open_setting(job).training_notes()
    assert "a single training image of green" in notes
    assert any(note.startswith("a batch of 64 is more than the 8 training") for note in notes)
    assert open_setting(replace(job, recipe=Recipe(batch_size=8))).training_notes() == [
        "weights: the head left out, as it is for other classes",
        "a single training image of green",
    ]
    with pytest.raises(ValueError, match="train_images: expected at least one of each of the 3"):
        open_setting(replace(job, images=replace(source, train_images=2)))
    listed = tmp_path / "train.txt"  # numbers of which one is missing
    listed.write_text("train/blue/000.png 0\ntrain/blue/001.png 0\ntrain/red/000.png 2\n")
    source = replace(source, train_list=str(listed))
    assert "no training image of 1" in open_setting(replace(job, images=source)).notes()
