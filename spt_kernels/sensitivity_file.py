"""The file of a sensitivity: the scores and what they belong to, in safetensors, checksummed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import write_atomically
from .errors import DeltaFormatError

FORMAT = "spt-sensitivity"
FORMAT_VERSION = 1


def write(
    path: str | os.PathLike[str], document: Mapping[str, Any], scores: Mapping[str, Tensor]
) -> None:
    """Write the file whole or not at all; an older one at `path` stays until the end."""
    tensors = _apart(scores)
    text = json.dumps(document, sort_keys=True)
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "document": text,
        "checksum": _checksum(text, tensors),
    }
    # one key, because safetensors writes several in an order that differs from run to run
    write_atomically(path, save(tensors, metadata={"spt": json.dumps(header, sort_keys=True)}))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DeltaFormatError: it is another kind of file, damaged, cut, or of a newer format.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("spt", "{}"))
            if header.get("format") != FORMAT:
                raise ValueError("it is not a sensitivity")
            if header["version"] != FORMAT_VERSION:
                raise ValueError(
                    f"it has format version {header['version']}, this package reads "
                    f"{FORMAT_VERSION}"
                )
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["checksum"] != _checksum(header["document"], scores):
            raise ValueError("it is damaged: the checksum does not match")
        return json.loads(header["document"]), scores
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaFormatError(f"cannot load the sensitivity {os.fspath(path)}: {error}") from error


def _apart(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores on the CPU, none sharing memory: safetensors refuses that."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, score in scores.items():
        score = score.detach().cpu().contiguous()
        storage = score.untyped_storage()
        if storage.nbytes() != score.nbytes or storage.data_ptr() in taken:
            score = score.clone()
        taken.add(score.untyped_storage().data_ptr())
        tensors[name] = score
    return tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
