"""The files of this package: a JSON document and tensors of one kind, of a known format version."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from ..errors import DeltaFormatError
from .atomic import write_atomically
from .container import pack, unpack

T = TypeVar("T")
Build = Callable[[dict[str, Any], dict[str, Tensor]], T]

# Kind of file -> the version that is written
VERSIONS = MappingProxyType({"task": 3, "plan": 3, "sensitivity": 3, "trained": 1})
_OLDEST = MappingProxyType({"task": 2})  # the oldest version that is read, where it is another
_FORMAT = "spt_kernels."
_NAMES = {"trained": "trained values"}  # in messages, where the kind is no name


def encode(kind: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Bytes of a file; the same content gives the same bytes.

    Args:
        kind: one of `VERSIONS`; `decode` refuses any other kind.
        document: what `json.dumps` takes; the order of its keys is kept.
        tensors: on any device.
    """
    metadata = {
        "format": _FORMAT + kind,
        "format_version": str(VERSIONS[kind]),
        kind: json.dumps(document, separators=(",", ":")),
    }
    return pack(metadata, tensors)


def decode(file: bytes, kind: str, source: str | os.PathLike[str], build: Build[T]) -> T:
    """What `build` makes of the document and the tensors that `encode` was given.

    Args:
        file: all bytes of the file.
        kind: what it must be.
        source: what the file is called in messages.
        build: may raise `ValueError`, or what wrong types in a document lead to.

    Raises:
        DeltaFormatError: it is another kind of file, damaged, cut, of another format version, or
            holds what cannot be built.
    """
    name = _NAMES.get(kind, kind)
    try:
        metadata, tensors = unpack(file)
        _check(metadata, kind)
        return build(_parse(metadata[kind]), tensors)
    except ValueError as error:
        raise DeltaFormatError(f"cannot load the {name} {os.fspath(source)}: {error}") from error
    except (LookupError, ArithmeticError, TypeError, AttributeError) as error:
        # a valid checksum over a description of wrong types, so written by something else
        raise DeltaFormatError(
            f"cannot load the {name} {os.fspath(source)}: it contradicts itself: {error!r}"
        ) from error


def write(
    path: str | os.PathLike[str],
    kind: str,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> int:
    """Write a file, whole or not at all, and return its size in bytes; arguments as `encode`."""
    file = encode(kind, document, tensors)
    write_atomically(path, file)
    return len(file)


def read(path: str | os.PathLike[str], kind: str, build: Build[T]) -> T:
    """Read what `write` wrote; as `decode`, and `OSError` if it cannot be read."""
    return decode(Path(path).read_bytes(), kind, path, build)


def kind_of(metadata: Mapping[str, str]) -> str | None:
    """The kind of a file with such metadata, None where it is not of this package."""
    kind = metadata.get("format", "").removeprefix(_FORMAT)
    return kind if kind in VERSIONS else None


def _check(metadata: Mapping[str, str], kind: str) -> None:
    if kind_of(metadata) != kind:
        raise ValueError(f"it is not a {kind} but of format {metadata.get('format')!r}")
    own, version = VERSIONS[kind], metadata.get("format_version", "")
    oldest = _OLDEST.get(kind, own)
    if not (version.isascii() and version.isdigit() and len(version) <= 9 and int(version) >= 1):
        raise ValueError(f"expected a format version, got {version!r}")
    if not oldest <= int(version) <= own:
        remedy = f"make the {kind} again" if int(version) < own else "upgrade spt_kernels"
        reads = f"version {own}" if oldest == own else f"versions {oldest} to {own}"
        raise ValueError(f"it has format version {version}, this package reads {reads}: {remedy}")
    expected = {"format", "format_version", kind}
    if metadata.keys() != expected:
        raise ValueError(f"expected metadata {sorted(expected)}, got {sorted(metadata)}")


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("its description is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its description is no JSON object")
    return value
