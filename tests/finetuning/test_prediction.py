"""Images in, classes with probabilities out."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spt_kernels.finetuning import Description, Prediction, Preprocessing, SavedRun, predict
from spt_kernels.finetuning.results.prediction import as_csv, find_images
from spt_kernels.finetuning.run.description import as_header

from .pictures_on_disk import write_images, write_weights

FORM = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
NAMES = ("owl", "wren", "a, b")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores are its head's bias, whatever the image, and images."""
    root = tmp_path_factory.mktemp("prediction")
    source = write_weights(root / "base.safetensors", 3)
    state = load_file(root / "base.safetensors")
    state["head.weight"].zero_()
    state["head.bias"].copy_(torch.tensor([0.1, 0.6, 0.3]).log())
    told = Description(source, NAMES, FORM).to_json()
    save_file(state, root / "model.safetensors", as_header(told))
    save_file(state, root / "unnamed.safetensors", as_header({"model": told["model"]}))
    images = write_images(root / "images", {"z": 1, "a": 2})
    for hidden in (".a.png", "a/.hidden/b.png", "._0.png"):
        (images / hidden).parent.mkdir(exist_ok=True)
        (images / hidden).write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image")
    (images / "folder.png").mkdir()
    return root


def test_the_most_probable_first(place: Path) -> None:
    saved = SavedRun.find(place / "model.safetensors")
    seen = predict(saved, [place / "images" / "z", place / "images" / "a" / "001.png"], top=2)
    assert [s.image.relative_to(place / "images") for s in seen] == [
        Path("z/000.png"),
        Path("a/001.png"),
    ]
    for s in seen:
        assert s.classes == ("wren", "a, b")
        assert s.probabilities == pytest.approx((0.6, 0.3), abs=1e-5)
    every = predict(saved, [place / "images"], top=9, batch_size=2)
    assert len(every) == 3
    assert all(sum(s.probabilities) == pytest.approx(1) for s in every)
    assert every[0].classes == ("wren", "a, b", "owl")


def test_numbers_stand_for_names_that_are_not_told(place: Path) -> None:
    saved = SavedRun.find(place / "unnamed.safetensors")
    assert predict(saved, [place / "images"])[0].classes == ("1",)
    named = predict(saved, [place / "images"], classes=("a", "b", "c"))
    assert named[0].classes == ("b",)
    with pytest.raises(ValueError, match="classes: the head has 3, got 2"):
        predict(saved, [place / "images"], classes=("a", "b"))
    with pytest.raises(ValueError, match="classes: the model tells its own, owl, wren"):
        predict(SavedRun.find(place / "model.safetensors"), [place], classes=("a", "b", "c"))


def test_mistakes_come_before_the_work(place: Path) -> None:
    saved = SavedRun.find(place / "model.safetensors")
    images = [place / "images"]
    for options, words in (
        ({"top": 0}, "top: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"amp": "fp8"}, "amp: expected"),
        ({"form": {"mean": (0.5,), "std": (0.5,)}}, "mean, std: .*3"),
        ({"form": {"size": 64}}, "image_size: this model takes 16"),
    ):
        with pytest.raises(ValueError, match=words):
            predict(saved, images, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot read the image"):
        predict(saved, [place / "images" / "notes.txt"])


def test_images_are_found_once_and_hidden_ones_never(place: Path) -> None:
    root = place / "images"
    found = [str(path.relative_to(root)) for path in find_images([root, root / "a" / "000.png"])]
    assert found == ["a/000.png", "a/001.png", "z/000.png"]
    with pytest.raises(ValueError, match=r"no such file or folder: .*none"):
        find_images([root, place / "none"])
    (place / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        find_images([place / "empty"])
    with pytest.raises(ValueError, match="at least one"):
        find_images([])


def test_csv_can_be_read_again() -> None:
    seen = [
        Prediction(Path('a "b",c.png'), ("x, y", "z"), (0.75, 0.25)),
        Prediction(Path("d.png"), ("z",), (1.0,)),
    ]
    rows = list(csv.DictReader(io.StringIO(as_csv(seen))))
    assert [row["image"] for row in rows] == ['a "b",c.png', 'a "b",c.png', "d.png"]
    assert [(row["rank"], row["class"], float(row["probability"])) for row in rows] == [
        ("1", "x, y", 0.75),
        ("2", "z", 0.25),
        ("1", "z", 1.0),
    ]


def test_images_of_a_folder_are_those_that_training_takes_from_it(tmp_path: Path) -> None:
    """A linked folder was passed over without a word, and a Synology's previews were images."""
    write_images(tmp_path / "elsewhere", {"b": 1})
    for left_behind in ("@eaDir", "__MACOSX"):
        write_images(tmp_path / "photos" / "a", {left_behind: 1})
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a" / "back").symlink_to(tmp_path / "photos")
    found = find_images([tmp_path / "photos"])
    assert found == (tmp_path / "photos" / "linked" / "b" / "000.png",)


def test_probabilities_that_are_no_numbers_are_an_error(place: Path, tmp_path: Path) -> None:
    with safe_open(place / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(place / "model.safetensors")
    state["head.bias"][1] = torch.nan
    save_file(state, tmp_path / "nan.safetensors", metadata)
    saved = SavedRun.find(tmp_path / "nan.safetensors")
    with pytest.raises(FloatingPointError, match="scores are nan on some of the images"):
        predict(saved, [place / "images"])
