"""Images as tensors: decoded, brought to size, normalised, in an order that a seed gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...distributed import Processes
from ...errors import needed
from ...methods.method import check_one_of
from ..device import generator_of
from ..progress import Progress, Silent
from .image_file import opened
from .image_mode import in_eight_bits
from .kept_part import AUGMENTATIONS, FITS, kept_part
from .labelled import LabelledImages
from .readable import MANY, check_readable, loaded
from .upright import upright

with needed("reading images"):
    from PIL import Image, ImageOps

CACHE_BYTES = 4 << 30  # decoded images up to this size are kept in memory

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what would make of every image NaN, or nothing; `ValueError`."""
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"mean: expected finite values, got {tuple(mean)}")
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"std: expected values above zero, got {tuple(std)}")


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it.

    Attributes:
        size: side of the square image.
        mean: per channel, of values in 0 to 1; one entry makes the images grey.
        std: likewise.
        interpolation: of the resize.
        fit: `"squash"` resizes to the square (as the paper does), `"crop"` resizes the shorter side
            and takes the middle.
        augment: of training images: `"none"` (as the paper does on VTAB-1k); or a random mirror
            image and a crop. `"crop-flip"`: of at least half the area; `"random-crop-flip"`: of
            `crop_pct` of each side, anywhere; `"resized-crop-flip"`: of 8 to 100 % of the area and
            of another shape, torchvision's `RandomResizedCrop`.
        crop_pct: the share of each side that is kept in the middle, 0.875 for 224 pixels of 256.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    fit: str = "squash"
    augment: str = "none"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image_size: expected more than zero, got {self.size}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean, std: expected 3 values each (1 for grey), got {self.mean} and {self.std}"
            )
        check_normalisation(self.mean, self.std)
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: expected more than 0 and at most 1, got {self.crop_pct}")
        for name, value, allowed in (
            ("interpolation", self.interpolation, _FILTERS),
            ("fit", self.fit, FITS),
            ("augment", self.augment, AUGMENTATIONS),
        ):
            check_one_of(name, value, allowed)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of what the model sees: channels, height, width."""
        return len(self.mean), self.size, self.size


def decode(path: Path, form: Preprocessing, generator: torch.Generator | None = None) -> Tensor:
    """Read one image as uint8 `[channels, size, size]`; with a generator, augmented.

    Raises:
        ValueError: the file is not an image, damaged, or of a mode that `in_eight_bits` refuses.
    """
    with opened(path) as file:
        image = in_eight_bits(upright(file), file, _mode_of(form))
    box, mirror = kept_part(image.size, form.fit, form.crop_pct, form.augment, generator)
    resized = image.resize((form.size, form.size), _FILTERS[form.interpolation], box=box)
    if mirror:
        resized = ImageOps.mirror(resized)
    flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return flat.view(form.size, form.size, len(form.mean)).permute(2, 0, 1).contiguous()


def _tried(form: Preprocessing, path: Path) -> None:
    """Read an image as `decode` does, in the least time, for its errors alone."""
    with opened(path) as file:
        file.draft(None, (1, 1))  # of a JPEG all is read, and an eighth of each side worked out
        in_eight_bits(upright(file), file, _mode_of(form))


def _glanced_at(path: Path) -> None:
    """Open an image, for the errors of that alone."""
    with opened(path):
        pass


def _mode_of(form: Preprocessing) -> str:
    return "RGB" if len(form.mean) == 3 else "L"


class PixelSet(Dataset[tuple[Tensor, int]]):
    """The decoded images of one split, kept in memory once `preload` has run.

    Attributes:
        labels: int64 `[n]`.
        form: the preprocessing.
        epoch: which augmentation of each image comes; the training loop sets it.
    """

    def __init__(self, images: LabelledImages, form: Preprocessing, seed: int = 0) -> None:
        self.paths = images.paths
        self.classes = images.classes
        self.labels = torch.tensor(images.labels, dtype=torch.int64)
        self.form = form
        self.seed = seed
        self.epoch = 0
        self._pixels: Tensor | None = None  # uint8 [n, channels, size, size]

    @classmethod
    def from_tensors(
        cls, pixels: Tensor, labels: Tensor, classes: Sequence[str], form: Preprocessing
    ) -> PixelSet:
        """Images already at hand: uint8 `[n, channels, size, size]` and int64 `[n]`."""
        made = cls(LabelledImages((), (), tuple(classes)), form)
        made.labels, made._pixels = labels, pixels
        return made

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self.labels[index])
        if self._pixels is not None:
            return self._pixels[index], label
        generator = None
        if self.form.augment != "none":
            # by image and epoch, so that neither workers nor a resume change what comes
            generator = generator_of((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
        return decode(self.paths[index], self.form, generator), label

    def preload(self, workers: int = 0, progress: Progress | None = None) -> PixelSet:
        """Decode every image once: to keep it, where memory allows, and to find a bad one early."""
        if self._pixels is not None:
            return self
        progress = progress or Silent()
        keep = self.form.augment == "none" and self._num_bytes <= CACHE_BYTES
        if not keep and workers == 0 and len(self) > MANY:
            return self  # a bad file among very many is found when its turn comes
        progress.start("reading images", len(self))
        parts = []
        for pixels, _ in loaded(DataLoader(self, batch_size=64, num_workers=workers)):
            parts += [pixels] if keep else []
            progress.advance(len(pixels))
        self._pixels = torch.cat(parts) if keep else None
        return self

    def check(self, workers: int, progress: Progress) -> None:
        """Read every image once, or of very many how it begins, and keep none.

        Raises:
            ValueError: one cannot be read.
        """
        read = functools.partial(_tried, self.form)
        check_readable(self.paths, read, _glanced_at, workers, progress, "checking images")

    @property
    def _num_bytes(self) -> int:
        return len(self) * len(self.form.mean) * self.form.size**2

    @property
    def is_loaded(self) -> bool:
        """Whether the images are in memory."""
        return self._pixels is not None


class Batches:
    """Normalised batches `(float [B, C, size, size], int64 [B])` of a `PixelSet` on a device.

    Iterating gives epoch 0; `epoch(n)` gives any. With a shuffle seed each epoch has its own order,
    which depends on the seed and the number of the epoch alone.

    Of several processes each gets a share of every batch, which may be empty: image `i` of an epoch
    goes to rank `i % size`. Iterating leaves out what is empty.
    """

    def __init__(
        self,
        pixels: PixelSet,
        batch_size: int,
        device: torch.device,
        *,
        shuffle_seed: int | None = None,
        workers: int = 0,
        processes: Processes | None = None,
    ) -> None:
        self.pixels = pixels
        self.batch_size = batch_size
        self.device = device
        self.shuffle_seed = shuffle_seed
        self.workers = workers
        self.processes = processes or Processes()
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(pixels.form.mean, device=device).view(shape) * 255
        self._std = torch.tensor(pixels.form.std, device=device).view(shape) * 255

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, labels) for images, labels in self.epoch(0) if len(labels))

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one pass over the images."""
        self.pixels.epoch = number
        shares = self._shares(number)
        loader = DataLoader(
            self.pixels,
            batch_sampler=[share for share in shares if share],
            num_workers=0 if self.pixels.is_loaded else self.workers,
            pin_memory=self.device.type == "cuda",
            # the loader draws a seed for its workers: from its own generator, not from the model's
            generator=torch.Generator().manual_seed(0),
        )
        every = loaded(loader)
        for share in shares:
            pixels, labels = next(every) if share else self._nothing()
            images = pixels.to(self.device, non_blocking=True).float()
            yield (
                images.sub_(self._mean).div_(self._std),
                labels.to(self.device, non_blocking=True),
            )

    def _shares(self, number: int) -> list[list[int]]:
        """For each batch of an epoch the images of it that are this process's."""
        order, size = self.order(number), self.processes.size
        starts = range(0, len(order), self.batch_size)
        own = (range(start, min(start + self.batch_size, len(order))) for start in starts)
        return [[order[i] for i in batch if i % size == self.processes.rank] for batch in own]

    def _nothing(self) -> tuple[Tensor, Tensor]:
        pixels = torch.empty(0, *self.pixels.form.image_shape, dtype=torch.uint8)
        return pixels, torch.empty(0, dtype=torch.int64)

    def order(self, number: int) -> list[int]:
        """The order of the images in epoch `number`."""
        if self.shuffle_seed is None:
            return list(range(len(self.pixels)))
        generator = generator_of(self.shuffle_seed * 1_000_003 + number)
        return torch.randperm(len(self.pixels), generator=generator).tolist()
