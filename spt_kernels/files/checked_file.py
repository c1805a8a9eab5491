"""The file of a plan or a sensitivity: a JSON document and tensors, in safetensors, checksummed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DeltaFormatError
from .atomic import write_atomically

FORMAT_VERSION = 2


def write(
    path: str | os.PathLike[str],
    kind: str,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the file whole or not at all; an older one at `path` stays until the end.

    Args:
        path: where to.
        kind: what the file is, one word: `read` refuses any other kind.
        document: what `json.dumps` takes; the order of its keys is kept.
        tensors: on any device, sharing memory or not.
    """
    own = _apart(tensors)
    text = json.dumps(document)
    header = {
        "format": f"spt-{kind}",
        "version": FORMAT_VERSION,
        "document": text,
        "checksum": _checksum(text, own),
    }
    # one key, because safetensors writes several in an order that differs from run to run
    write_atomically(path, save(own, metadata={"spt": json.dumps(header, sort_keys=True)}))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote.

    Raises:
        OSError: the file cannot be read; `FileNotFoundError` and `IsADirectoryError` among them.
        DeltaFormatError: it is another kind of file, damaged, cut, or of another format version.
    """
    with open(path, "rb"):
        pass  # of a path that cannot be read Python tells more than safetensors does
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = _parse((file.metadata() or {}).get("spt", "{}"))
            if header.get("format") != f"spt-{kind}":
                raise ValueError(f"it is not a {kind}")
            _check_version(header["version"], kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["checksum"] != _checksum(header["document"], tensors):
            raise ValueError("it is damaged: the checksum does not match")
        return _parse(header["document"]), tensors
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaFormatError(f"cannot load the {kind} {os.fspath(path)}: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("its description is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its description is no JSON object")
    return value


def _check_version(version: Any, kind: str) -> None:
    if version == FORMAT_VERSION:
        return
    is_older = isinstance(version, int) and version < FORMAT_VERSION
    remedy = f"make the {kind} again" if is_older else "a newer spt_kernels wrote it"
    raise ValueError(
        f"it has format version {version}, this package reads {FORMAT_VERSION}: {remedy}"
    )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory: safetensors refuses that."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # NumPy knows no bf16
    return digest.hexdigest()
