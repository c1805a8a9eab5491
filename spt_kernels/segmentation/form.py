"""What happens to the pixels of a scene before the model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..finetuning.images.pixels import check_normalisation


@dataclass(frozen=True)
class SceneForm:
    """How scenes are brought to the model. The defaults are those of SETR on ADE20K.

    Attributes:
        mean: of each colour, of values in 0 to 1.
        std: likewise.
        size: side in pixels of the square that the model sees at once. A whole image is scaled
            until its shorter side is of this length (and its longer no more than four times that).
        stride: pixels from one window to the next, when an image is larger than one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int = 512
    stride: int = 341

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != 3:
                raise ValueError(f"{name}: expected 3 values, got {value}")
        check_normalisation(self.mean, self.std)
        if self.size < 1:
            raise ValueError(f"size: expected more than zero, got {self.size}")
        if not 0 < self.stride <= self.size:
            raise ValueError(
                f"stride: expected 1 to the {self.size} pixels of a window, got {self.stride}"
            )

    def scaled(self, height: int, width: int, ratio: float = 1.0) -> tuple[int, int]:
        """The size that an image of so many pixels is brought to, times `ratio`."""
        short, long = min(height, width), max(height, width)
        factor = min(self.size / short, 4 * self.size / long) * ratio
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    def to_json(self) -> dict[str, Any]:
        """As the `preprocessing` that a task file tells."""
        lists = {"mean": list(self.mean), "std": list(self.std)}
        return {**asdict(self), **lists, "interpolation": "bilinear"}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> SceneForm:
        """Read what `to_json` wrote; `ValueError` if it is malformed."""
        try:
            mean, std = tuple(told["mean"]), tuple(told["std"])
            return cls(mean, std, told["size"], told["stride"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"preprocessing: not that of a segmentation ({error})") from error
