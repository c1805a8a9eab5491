"""The file of a plan: a JSON document and the positions, in safetensors, under one checksum."""

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

FORMAT = "spt-plan"
FORMAT_VERSION = 1


def write(
    path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the file whole or not at all; an older one at `path` stays until the end."""
    text = json.dumps(document)
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "plan": text,
        "checksum": _checksum(text, tensors),
    }
    # one key, because safetensors writes several in an order that differs from run to run
    data = save(dict(tensors), metadata={"spt": json.dumps(header, sort_keys=True)})
    write_atomically(path, data)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote; `DeltaFormatError` for another, damaged or newer file."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("spt", "{}"))
            if header.get("format") != FORMAT:
                raise ValueError("it is not a plan")
            if header.get("version") != FORMAT_VERSION:
                raise ValueError(
                    f"it has format version {header.get('version')}, this package reads "
                    f"{FORMAT_VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("checksum") != _checksum(header["plan"], tensors):
            raise ValueError("it is damaged: the checksum does not match")
        return json.loads(header["plan"]), tensors
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaFormatError(f"cannot load the plan {os.fspath(path)}: {error}") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
