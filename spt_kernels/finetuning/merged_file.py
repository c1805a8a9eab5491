"""A merged model as a plain state dict in a file, which says of itself what it is of."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..files.atomic import write_atomically
from .models import ModelSource
from .pixels import Preprocessing
from .weight_file import metadata_of

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_KEY = "spt_kernels"


@dataclass(frozen=True)
class MergedAbout:
    """What is known of a merged model beside its values.

    Attributes:
        model: the architecture; its weights are the file itself.
        classes: of the head.
        form: the preprocessing.
    """

    model: ModelSource
    classes: tuple[str, ...]
    form: Preprocessing


def check_merged_name(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` unless the name ends as one of `SUFFIXES`, which tells the format."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"expected a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"got {os.fspath(path)}"
        )


def write_merged(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], about: MergedAbout | None = None
) -> int:
    """Write a state dict, whole or not at all, and return the size of the file in bytes.

    Args:
        path: ending in `.safetensors`, or as `torch.save` files do; the latter hold the tensors
            alone, so that `load_state_dict` takes them as they are.
        state: names and tensors; tied ones are written once for each name.
        about: what a safetensors file says of the model.
    """
    check_merged_name(path)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if Path(path).suffix.lower() == ".safetensors":
        metadata = {"format": "pt"}  # what other readers look for
        if about is not None:
            described = replace(about, model=replace(about.model, weights=None, pretrained=False))
            metadata[_KEY] = json.dumps(asdict(described))
        data = save(own, metadata)
    else:
        buffer = io.BytesIO()
        torch.save(own, buffer)
        data = buffer.getvalue()
    write_atomically(path, data)
    return len(data)


def read_about(path: str | os.PathLike[str]) -> MergedAbout | None:
    """What `write_merged` wrote of the model, `None` in any other file of weights."""
    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{":
            return None
    text = metadata_of(path).get(_KEY)
    if text is None:
        return None
    value = json.loads(text)
    form: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in value["form"].items()
    }
    return MergedAbout(
        ModelSource(**value["model"]), tuple(value["classes"]), Preprocessing(**form)
    )
