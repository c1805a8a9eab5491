"""A safetensors file in which every bit is covered by a checksum.

It opens with `<u64 header length>{"__metadata__":{"checksum":"<64 hex digits>",`: the checksum
lies at a fixed place, and is the BLAKE2b-256 of every byte of the file but its own 64 digits. So it
is verified before anything else is believed, and any safetensors reader can open the file as well.
The order of everything is fixed: the same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OPENING = b'{"__metadata__":{"checksum":"'
_DIGEST_BYTES = 32
_DIGITS = slice(8 + len(_OPENING), 8 + len(_OPENING) + 2 * _DIGEST_BYTES)
MAX_HEADER_BYTES = 1 << 24  # a hundred times that of a ViT-L; a larger claim is a damaged file


def pack(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Bytes of a safetensors file with `tensors`, `metadata` and the checksum.

    Raises:
        TypeError: a tensor is of a dtype that the file does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name}: expected one of {sorted(_DTYPES)}, got {tensor.dtype}")
    # widest first, so that each tensor lies at a multiple of its item size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {
        "__metadata__": {"checksum": "0" * 2 * _DIGEST_BYTES, **dict(sorted(metadata.items()))}
    }
    blocks: list[memoryview] = []
    offset = 0
    for name in names:
        tensor = tensors[name]
        blocks.append(bytes_of(tensor))
        end = offset + blocks[-1].nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(text)} bytes, expected at most {MAX_HEADER_BYTES}")
    head = bytearray(len(text).to_bytes(8, "little") + text)
    head[_DIGITS] = _checksum(head, *blocks)
    return b"".join([head, *blocks])


def unpack(file: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that `pack` wrote.

    Raises:
        ValueError: the file is another kind of file, damaged, cut, or contradicts itself.
    """
    opening = file[8 : _DIGITS.start]
    if len(file) < _DIGITS.stop or opening != _OPENING:
        raise ValueError(
            f"its {len(file)} bytes do not open as a file of spt_kernels does: "
            "it is another kind of file, or one cut or damaged at its beginning"
        )
    n_header = int.from_bytes(file[:8], "little")
    if n_header > min(MAX_HEADER_BYTES, len(file) - 8):
        raise ValueError(
            f"header of {n_header} bytes in a file of {len(file)}: the file is cut or damaged"
        )
    stored, computed = file[_DIGITS], _checksum(file)
    if stored != computed:
        raise ValueError(
            f"checksum mismatch: the file says {stored[:12].decode('ascii', 'replace')}…, its "
            f"{len(file)} bytes give {computed[:12].decode()}…: the file is cut or damaged"
        )
    header = _parse(file[8 : 8 + n_header])
    metadata = header.pop("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("expected metadata of strings")
    del metadata["checksum"]
    return metadata, _read_tensors(header, memoryview(file)[8 + n_header :])


def bytes_of(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor's elements in row-major order, wherever the tensor lives."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data  # no copy of what is on the CPU already


def _read_tensors(header: Mapping[str, Any], data: memoryview) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    position = 0
    for name, entry in header.items():
        if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
            raise ValueError(f"{name}: expected dtype, shape and data_offsets, got {entry!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a dtype of {sorted(_DTYPES)}, got {dtype!r}")
        if not _is_shape(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name}: expected sizes of 0 or more, got {shape!r}, {offsets!r}")
        n_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
        begin, end = offsets
        if begin != position or end - begin != n_bytes or end > len(data):
            raise ValueError(
                f"{name}: {n_bytes} bytes expected at {position}, got {begin}..{end} of {len(data)}"
            )
        if n_bytes:
            # a copy: the tensor must not keep the whole file alive, nor share memory with another
            block = bytearray(data[begin:end])
            tensors[name] = torch.frombuffer(block, dtype=_DTYPES[dtype]).reshape(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=_DTYPES[dtype], device="cpu")
        position = end
    if position != len(data):
        raise ValueError(f"expected {position} bytes of tensors, got {len(data)}")
    return tensors


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is no JSON: {error}") from error
    if not isinstance(header, dict) or "__metadata__" not in header:
        raise ValueError("the header is no JSON object with metadata")
    return header


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _is_shape(value: Any) -> bool:
    # torch refuses more than 64 dimensions, and strides beyond 64 bits, which an empty one can have
    return _is_sizes(value) and len(value) <= 8 and math.prod(n or 1 for n in value) < 2**63


def _checksum(head: bytes | bytearray, *rest: memoryview) -> bytes:
    view = memoryview(head)
    digest = hashlib.blake2b(view[: _DIGITS.start], digest_size=_DIGEST_BYTES)
    for part in (view[_DIGITS.stop :], *rest):
        digest.update(part)
    return digest.hexdigest().encode()
