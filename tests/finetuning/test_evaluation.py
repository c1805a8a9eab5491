"""Images are matched to a saved model's classes by name, or refused; never by place alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spt_kernels.finetuning import (
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Recipe,
    SavedRun,
    evaluate_saved,
    finetune,
    images_of,
    predict,
)
from spt_kernels.finetuning.images.labelled import LabelledImages
from spt_kernels.finetuning.training.accuracy import Accuracy, evaluate

from .pictures_on_disk import write_images

KNOWN = ("red", "green", "blue")  # not as folders are sorted


def model_of(
    classes: tuple[str, ...], root: Path | None = None, trained_on: tuple[str, ...] = ()
) -> SavedRun:
    base = ModelSource("vit_tiny_patch16_224", weights="base.safetensors")
    source = ImageSource(str(root), classes=trained_on)
    job = None if root is None else FinetuneJob(base, source)
    return SavedRun(Path("task.safetensors"), base, 3, classes, job=job)


def by_name(images: LabelledImages) -> dict[str, int]:
    """How many images of each folder have the label of the class of that name."""
    assert all(
        images.classes[label] == path.parent.name
        for path, label in zip(images.paths, images.labels, strict=True)
    )
    return dict(zip(images.classes, images.counts(), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root / "same", {"blue": 1, "green": 2, "red": 3})
    write_images(root / "fewer" / "test", {"blue": 1, "red": 3})
    write_images(root / "more", {"blue": 1, "green": 2, "pink": 1, "red": 3})
    write_images(root / "other", {"bleu": 1, "rouge": 3, "vert": 2})
    write_images(root / "untested" / "train", {"blue": 1, "red": 1, "green": 1})
    lines = ("red/000.png red\n", "blue/000.png blue\n", "green/001.png green\n")
    (root / "list.txt").write_text("".join(lines))
    (root / "numbers.txt").write_text("red/000.png 0\nblue/000.png 2\n")
    return root


def test_another_order_is_mapped(data: Path) -> None:
    images = images_of(model_of(KNOWN), data / "same")
    assert by_name(images) == {"red": 3, "green": 2, "blue": 1}
    assert images.classes == KNOWN
    images = images_of(model_of(KNOWN), data / "same", data / "list.txt")
    assert by_name(images) == {"red": 1, "green": 1, "blue": 1}


def test_classes_without_images_are_no_mistake(data: Path) -> None:
    assert by_name(images_of(model_of(KNOWN), data / "fewer")) == {"red": 3, "green": 0, "blue": 1}


def test_classes_may_be_named_in_any_order(data: Path) -> None:
    for asked in (("blue", "green", "red"), ("green", "red", "blue")):
        images = images_of(model_of(KNOWN), data / "more", classes=asked)
        assert by_name(images) == {"red": 3, "green": 2, "blue": 1}
    images = images_of(model_of(KNOWN), data / "more", classes=("blue", "red"))
    assert by_name(images) == {"red": 3, "green": 0, "blue": 1}


@pytest.mark.parametrize(
    ("folder", "file", "classes", "words"),
    [
        ("other", None, (), "data: the model does not know bleu, rouge, vert, only red, green"),
        ("more", None, (), "does not know pink, .* look at, red,green,blue, to leave them out"),
        ("same", None, ("red", "pink"), "classes: 'pink' is not among the model's: red, green"),
        ("fewer", None, ("red", "green"), "classes: the data has no image of green"),
        ("same", "numbers.txt", (), "data: the model does not know 0, 2"),
        ("untested", None, (), "data: .*untested has train/ but no test/"),
    ],
)
def test_other_classes_are_refused(
    folder: str, file: str | None, classes: tuple[str, ...], words: str, data: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        images_of(model_of(KNOWN), data / folder, file and data / file, classes)


def test_the_images_of_the_run_are_those_it_was_asked_for(data: Path) -> None:
    """A run on some classes of a folder is tested on these, without a word."""
    some = model_of(KNOWN, data / "more", trained_on=KNOWN)
    assert by_name(images_of(some)) == {"red": 3, "green": 2, "blue": 1}
    without_green = model_of(KNOWN, data / "fewer", trained_on=KNOWN)
    assert by_name(images_of(without_green)) == {"red": 3, "green": 0, "blue": 1}
    with pytest.raises(ValueError, match="does not know pink"):
        images_of(some, data / "more")
    with pytest.raises(ValueError, match="data: name the folder"):
        images_of(model_of(KNOWN))


def test_a_model_that_does_not_tell_goes_by_place(data: Path) -> None:
    images = images_of(model_of(()), data / "same")
    assert images.classes == ("blue", "green", "red")
    images = images_of(model_of(()), data / "more", classes=KNOWN)
    assert by_name(images) == {"red": 3, "green": 2, "blue": 1}
    assert images.classes == KNOWN
    with pytest.raises(ValueError, match="classes: the head has 3, got 2"):
        images_of(model_of(()), data / "same", classes=("red", "blue"))
    with pytest.raises(ValueError, match="data: the head has 3 classes, the data 4"):
        images_of(model_of(()), data / "more")


@pytest.mark.usefixtures("quickly")
def test_a_model_is_looked_at_in_the_precision_that_it_was_tested_in(
    task: ImageSource, base: ModelSource, tmp_path: Path
) -> None:
    recipe = Recipe(epochs=1, amp="bf16")
    finetune(FinetuneJob(base, task, Method("linear"), recipe), tmp_path / "run")
    saved = SavedRun.find(tmp_path / "run")
    images = images_of(saved)
    same, bf16, fp32 = (evaluate_saved(saved, images, amp=amp) for amp in (None, "bf16", "none"))
    assert same == bf16
    assert same.loss != fp32.loss
    same, bf16, fp32 = (predict(saved, images.paths, amp=amp) for amp in (None, "bf16", "none"))
    assert same == bf16 != fp32


def test_scores_that_are_no_numbers_have_no_accuracy() -> None:
    class Nan(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.where(images.sum((1, 2, 3))[:, None] > 0, torch.nan, torch.eye(3)[:1])

    batches = [(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))]
    assert evaluate(Nan(), batches).correct == 1
    batches.append((torch.ones(1, 3, 2, 2), torch.tensor([0])))
    with pytest.raises(FloatingPointError, match="scores are nan on some of 3 images"):
        evaluate(Nan(), batches)


def test_accuracy_by_class_and_confusion() -> None:
    labels, predictions = (0, 0, 0, 0, 1, 1), (0, 0, 0, 1, 2, 1)
    seen = Accuracy(4, 6, 1.0, (3, 1, 0), (4, 2, 0), predictions, labels)
    assert seen.by_class == (0.75, 0.5, None)
    assert seen.class_mean == 0.625
    assert seen.confusion() == [[3, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert seen.taken_for() == [(0, 0, 3), (0, 1, 1), (1, 1, 1), (1, 2, 1)]
