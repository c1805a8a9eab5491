"""The options that commands share, in groups that know what they describe.

Nothing here imports torch before a command runs: `--help` must come at once.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..finetuning.images.splits import ImageSource
    from ..finetuning.job.job import ModelSource


def described(panel: str, flags: str, help: str) -> Any:
    """An option under the heading `panel`.

    Args:
        panel: the heading.
        flags: as `"--data -d FOLDER"`, the last words being what stands for the value, if any.
        help: names the default in square brackets.
    """
    words = flags.split()
    names = [word for word in words if word.startswith("-")]
    return typer.Option(
        *names,
        help=help.replace("[", r"\["),  # not a tag of rich's markup
        rich_help_panel=panel,
        metavar=" ".join(words[len(names) :]) or None,
        show_default=False,
    )


_MODEL = "Model"
_IMAGES = "Images"
_FORM = "Preprocessing"
_STEP = "Step"
_RUN = "Run"
_OUTPUT = "Output"


@dataclass(frozen=True)
class OutputOptions:
    """How a command speaks."""

    as_json: Annotated[
        bool, described(_OUTPUT, "--json", "One JSON object on stdout and nothing else there.")
    ] = False
    quiet: Annotated[bool, described(_OUTPUT, "--quiet -q", "No progress on stderr.")] = False
    debug: Annotated[bool, described(_OUTPUT, "--debug", "Show where an error came from.")] = False


@dataclass(frozen=True)
class ArchitectureOptions:
    """A model whose values are not needed."""

    model: Annotated[
        str | None,
        described(_MODEL, "--model -m NAME", "Any timm architecture, as vit_base_patch16_224."),
    ] = None
    model_arg: Annotated[
        list[str] | None,
        described(
            _MODEL,
            "--model-arg KEY=VALUE",
            "An argument of its constructor, as img_size=32; repeat for more. The number of "
            "classes is that of the data.",
        ),
    ] = None

    def source(self) -> ModelSource | None:
        """The model described, `None` if none is."""
        from ..finetuning.base.models import ModelSource

        if self.model is None:
            if self.model_arg:
                raise ValueError("--model: name the architecture that --model-arg is for")
            return None
        return ModelSource(self.model, _parse_args(self.model_arg or []))


@dataclass(frozen=True)
class WeightsOptions(ArchitectureOptions):
    """A model with its values."""

    weights: Annotated[
        Path | None,
        described(
            _MODEL,
            "--weights -w FILE",
            "State dict, .safetensors or .pt. A head for other classes is left out.",
        ),
    ] = None
    pretrained: Annotated[
        bool, described(_MODEL, "--pretrained", "Let timm download its weights.")
    ] = False

    def source(self) -> ModelSource | None:
        """The model described, `None` if none is."""
        from ..finetuning.base.models import ModelSource

        if self.model is None:
            if self.model_arg or self.weights or self.pretrained:
                raise ValueError(
                    "--model: name the architecture that the other model options are for"
                )
            return None
        weights = str(self.weights.resolve()) if self.weights is not None else None
        args = _parse_args(self.model_arg or [])
        return ModelSource(self.model, args, weights, self.pretrained)


@dataclass(frozen=True)
class ModelOptions(WeightsOptions):
    """The base model."""

    new_head: Annotated[
        bool,
        described(_MODEL, "--new-head", "Start the head afresh though the classes are as many."),
    ] = False

    def source(self) -> ModelSource | None:
        """The model described, `None` if none is."""
        source = super().source()
        if source is None:
            if self.new_head:
                raise ValueError(
                    "--model: name the architecture that the other model options are for"
                )
            return None
        return replace(source, new_head=self.new_head)


@dataclass(frozen=True)
class ImageOptions:
    """The images of a task."""

    data: Annotated[
        Path | None,
        described(
            _IMAGES,
            "--data -d FOLDER",
            "Folder with train/, and if you have them val/ and test/, each with a folder per "
            "class; or what the paths in the lists start from.",
        ),
    ] = None
    train_list: Annotated[
        Path | None,
        described(_IMAGES, "--train-list FILE", "Lines 'path label' (VTAB), for train/."),
    ] = None
    val_list: Annotated[
        Path | None, described(_IMAGES, "--val-list FILE", "Likewise for val/.")
    ] = None
    test_list: Annotated[
        Path | None, described(_IMAGES, "--test-list FILE", "Likewise for test/.")
    ] = None
    layout: Annotated[
        str | None,
        described(
            _IMAGES,
            "--layout NAME",
            "Read --data as the authors of a data set share it: cub-200-2011, nabirds, "
            "oxford-flowers, stanford-dogs or stanford-cars.",
        ),
    ] = None
    classes: Annotated[
        str | None,
        described(
            _IMAGES,
            "--classes A,B,…",
            "Use these classes alone, in this order; '\"a, b\"' for one with a comma.",
        ),
    ] = None
    train_images: Annotated[
        int | None,
        described(
            _IMAGES,
            "--train-images N",
            "Train on N images, as many of each class; --seed draws them.",
        ),
    ] = None
    val_share: Annotated[
        float | None,
        described(
            _IMAGES,
            "--val-share SHARE",
            "Without val/, hold out this share of the training images [0.1]. test/ is only "
            "ever used once, at the end.",
        ),
    ] = None

    def source(self) -> ImageSource:
        """The images described."""
        from ..finetuning.images.splits import ImageSource

        if self.data is None:
            raise ValueError("--data: name the folder of the images")
        lists: dict[str, Any] = {
            name: str(path.resolve())
            for name in ("train_list", "val_list", "test_list")
            if (path := getattr(self, name)) is not None
        }
        more: dict[str, Any] = {} if self.val_share is None else {"val_share": self.val_share}
        return ImageSource(
            str(self.data.resolve()),
            classes=split_names(self.classes, "--classes"),
            train_images=self.train_images,
            layout=self.layout,
            **lists,
            **more,
        )


@dataclass(frozen=True)
class FormOptions:
    """What happens to an image before the model sees it."""

    image_size: Annotated[
        int | None, described(_FORM, "--image-size N", "Side in pixels [the model's].")
    ] = None
    mean: Annotated[
        str | None, described(_FORM, "--mean R,G,B", "Of values in 0…1 [the model's].")
    ] = None
    std: Annotated[str | None, described(_FORM, "--std R,G,B", "Likewise [the model's].")] = None
    fit: Annotated[
        str | None,
        described(_FORM, "--fit HOW", "squash to a square, or crop the middle [squash]."),
    ] = None
    crop_pct: Annotated[
        float | None,
        described(_FORM, "--crop-pct SHARE", "Of each side, kept in the middle, as 0.875 [1]."),
    ] = None

    def overrides(self) -> dict[str, Any]:
        """The fields of `Preprocessing` that were given."""
        values = {
            "size": self.image_size,
            "mean": parse_floats("--mean", self.mean),
            "std": parse_floats("--std", self.std),
            "fit": self.fit,
            "crop_pct": self.crop_pct,
        }
        return {name: value for name, value in values.items() if value is not None}


# where several methods are asked about at once
BudgetOfMethods = Annotated[
    str | None,
    described(
        _STEP,
        "--budget -b N",
        "Of a method that has one: 400000, 0.4M, or a share of the backbone, 0.005 or 0.5% [0.5%].",
    ),
]


@dataclass(frozen=True)
class SizeOptions:
    """The batch of a step that is accounted or timed, and its precision."""

    batch_size: Annotated[
        int, described(_STEP, "--batch --batch-size N", "Images per step [64].")
    ] = 64
    image_size: Annotated[
        int | None, described(_STEP, "--image-size N", "Side in pixels [the model's].")
    ] = None
    num_classes: Annotated[int, described(_STEP, "--num-classes N", "Of the head [100].")] = 100
    dtype: Annotated[
        str, described(_STEP, "--dtype NAME", "fp32, bf16-autocast or bf16 [fp32].")
    ] = "fp32"

    def check_counts(self) -> None:
        """Refuse a batch, or a head, of nothing."""
        for name, number in (("--batch", self.batch_size), ("--num-classes", self.num_classes)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs; none of it changes the result on one machine."""

    device: Annotated[
        str, described(_RUN, "--device NAME", "auto, cpu, cuda or cuda:N [auto].")
    ] = "auto"
    workers: Annotated[
        int, described(_RUN, "--workers N", "Processes that read images [0: this one].")
    ] = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"--workers: expected 0 or more processes, got {self.workers}")


def split_names(text: str | None, flag: str | None = None) -> tuple[str, ...]:
    """`a,b` as `("a", "b")`; a name that holds a comma stands in double quotes.

    Raises:
        ValueError: of an option, by its `flag`, that is given with no name, as `"$NAMES"` may be.
    """
    rows = list(csv.reader([text or ""], skipinitialspace=True))
    names = tuple(name.strip() for row in rows for name in row if name.strip())
    if flag is not None and text is not None and not names:
        raise ValueError(f"{flag}: expected names with commas between, got {text!r}")
    return names


def _parse_args(pairs: list[str]) -> dict[str, Any]:
    """`["img_size=32", "act_layer=relu"]` as a dict; values are JSON where they can be."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--model-arg: expected KEY=VALUE, got {pair!r}")
        try:
            values[name.strip()] = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            values[name.strip()] = text
    return values


def parse_floats(flag: str, text: str | None) -> tuple[float, ...] | None:
    """`0.5,0.5,0.5` as numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"{flag}: expected one number per channel, apart by commas, got {text!r}"
        ) from error
