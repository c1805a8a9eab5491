"""What a saved file tells of a segmentation model: all that is needed to use it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..finetuning.base.models import ModelSource
from ..finetuning.job.job import plain
from ..finetuning.run.description import SEGMENTATION as KIND
from ..finetuning.run.description import told_of
from ..methods import Method
from .base_model import SegmentationModel, build_setr
from .form import SceneForm

_DECODER = "setr-pup"


@dataclass(frozen=True)
class SegmentationDescription:
    """What is needed to use a saved file alone.

    Attributes:
        model: how to build the backbone. The path of the weights is that of the machine it was
            trained on.
        classes: their names, in the order of the scores.
        form: what happens to the pixels.
        channels: of the decoder.
        auxiliary: the blocks that auxiliary heads read.
        method: what was trained, where it takes that to read the values.
    """

    model: ModelSource
    classes: tuple[str, ...]
    form: SceneForm
    channels: int
    auxiliary: tuple[int, ...]
    method: Method | None = None

    def build(self) -> SegmentationModel:
        """The model before tuning; errors as `build_setr`."""
        return build_setr(
            self.model,
            len(self.classes),
            self.form.size,
            channels=self.channels,
            auxiliary=self.auxiliary,
        )

    def to_json(self) -> dict[str, Any]:
        """As metadata of a file, which `from_json` reads."""
        told: dict[str, Any] = {
            "model": told_of(self.model),
            "classes": self.classes,
            "preprocessing": self.form.to_json(),
            KIND: {"decoder": _DECODER, "channels": self.channels, "auxiliary": self.auxiliary},
        }
        if self.method is not None:
            told["method"] = asdict(self.method)
        value: dict[str, Any] = plain(told)
        return value

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> SegmentationDescription:
        """Read what `to_json` wrote; `ValueError` if it is malformed, or of another decoder."""
        try:
            model, decoder, method = told["model"], told[KIND], told.get("method")
            if decoder["decoder"] != _DECODER:
                raise ValueError(f"expected decoder {_DECODER}, got {decoder['decoder']!r}")
            return cls(
                ModelSource(
                    model["name"], model["arguments"], model["weights"], model["pretrained"]
                ),
                tuple(told["classes"]),
                SceneForm.from_json(told["preprocessing"]),
                int(decoder["channels"]),
                tuple(decoder["auxiliary"]),
                None if method is None else Method.from_json(method),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a segmentation model: {error}") from error
