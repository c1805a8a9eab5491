"""The options of commands that use a saved model: where its base is, if it does not tell itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .options import FormOptions, ModelOptions, described

if TYPE_CHECKING:
    from ..finetuning.run.saved_run import SavedRun

_MODEL = "Base model (a file tells its own)"
_FORM = "Preprocessing (a file tells its own)"


@dataclass(frozen=True)
class SavedOptions:
    """The base model of a saved one, in place of the one that it tells."""

    model: Annotated[
        str | None,
        described(_MODEL, "--model -m NAME", "Any timm architecture, as vit_base_patch16_224."),
    ] = None
    model_arg: Annotated[
        list[str] | None,
        described(
            _MODEL,
            "--model-arg KEY=VALUE",
            "An argument of its constructor, as img_size=32; repeat for more. With --model.",
        ),
    ] = None
    weights: Annotated[
        Path | None,
        described(_MODEL, "--weights -w FILE", "Its weights, where they have moved."),
    ] = None
    pretrained: Annotated[
        bool, described(_MODEL, "--pretrained", "Let timm download its weights. With --model.")
    ] = False

    def find(self, path: Path) -> SavedRun:
        """The saved model at `path`, on the base that was named, if any."""
        from ..finetuning.run.saved_run import SavedRun

        if self.weights is not None and not self.weights.exists():
            raise ValueError(f"--weights: no such file: {self.weights}")
        if self.model is None and self.weights is not None:
            if self.model_arg or self.pretrained:
                raise ValueError("--model: name the architecture that the other options are for")
            return SavedRun.find(path, weights=self.weights.resolve())
        asked = ModelOptions(self.model, self.model_arg, self.weights, self.pretrained)
        return SavedRun.find(path, asked.source())


@dataclass(frozen=True)
class SavedFormOptions(FormOptions):
    """What happens to an image before a saved model sees it, where that is not as it tells."""

    image_size: Annotated[int | None, described(_FORM, "--image-size N", "Side in pixels.")] = None
    mean: Annotated[str | None, described(_FORM, "--mean R,G,B", "Of values in 0…1.")] = None
    std: Annotated[str | None, described(_FORM, "--std R,G,B", "Likewise.")] = None
    fit: Annotated[
        str | None, described(_FORM, "--fit HOW", "squash to a square, or crop the middle.")
    ] = None
    crop_pct: Annotated[
        float | None,
        described(_FORM, "--crop-pct SHARE", "Of each side, kept in the middle, as 0.875."),
    ] = None


@dataclass(frozen=True)
class BatchOptions:
    """How images go through a saved model."""

    batch_size: Annotated[int, described("Run", "--batch-size N", "Images at a time [64].")] = 64
    amp: Annotated[
        str | None,
        described("Run", "--amp NAME", "none or bf16 autocast [as the run was tested, else none]."),
    ] = None

    def how(self) -> dict[str, Any]:
        """As arguments, checked before anything is read."""
        from ..finetuning.results.evaluation import check_options

        check_options(self.batch_size, "none" if self.amp is None else self.amp)
        return {"batch_size": self.batch_size, "amp": self.amp}
