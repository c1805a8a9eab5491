"""A merged model as a plain state dict in a file, which says of itself what it is of."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...files.atomic import write_atomically
from .description import as_header

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def check_merged_name(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` unless the name ends as one of `SUFFIXES`, which tells the format."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"expected a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"got {os.fspath(path)}"
        )


def write_merged(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    about: Mapping[str, Any] | None = None,
) -> int:
    """Write a state dict, whole or not at all, and return the size of the file in bytes.

    Args:
        path: ending in `.safetensors`, or as `torch.save` files do; the latter hold the tensors
            alone, so that `load_state_dict` takes them as they are.
        state: names and tensors; tied ones are written once for each name.
        about: what a safetensors file says of the model, as `Description.to_json` has it.
    """
    check_merged_name(path)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if Path(path).suffix.lower() == ".safetensors":
        metadata = {"format": "pt"}  # what other readers look for
        if about is not None:
            metadata |= as_header(about)
        data = save(own, metadata)
    else:
        buffer = io.BytesIO()
        torch.save(own, buffer)
        data = buffer.getvalue()
    write_atomically(path, data)
    return len(data)
