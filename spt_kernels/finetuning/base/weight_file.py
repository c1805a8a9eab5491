"""A file of weights as groups of named tensors, whoever wrote it; any other file called by name."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...files.checked_file import kind_of

FORMS = "a state dict in .safetensors or torch's .pt, .pth, .bin; or AugReg's .npz"
_DEPTH = 3  # checkpoints nest weights as {"model": {"encoder": {name: tensor}}} at the deepest
# what training scripts put beside the weights, none of which runs code when it is unpickled
_SAFE: list[Any] = [
    argparse.Namespace,
    (np.dtype, "numpy.dtype"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]
_ZIP = b"PK\x03\x04"
_CUT = "cut or damaged; fetch it again"
# how files open that are taken for weights, and what to do about it
_OPENINGS = {
    b"version https://git-lfs": (
        "a Git LFS pointer that stands for the weights; `git lfs pull` fetches them"
    ),
    b"<": "a web page or XML, what a failed download leaves; download the weights again",
    b"{": "JSON text, as the index or configuration beside a file of weights; name that file",
    b"\x89HDF": "an HDF5 file of Keras; convert it to a state dict",
    b"GGUF": "a GGUF file; convert it to a state dict",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
}


def read_state_dicts(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Every group of named tensors in a safetensors file or in what `torch.save` wrote.

    Returns:
        Where a group lies in the file, `""` for the file itself or as `"state_dict_ema"`, and its
        tensors by name, on the CPU.

    Raises:
        ValueError: no such file, it is cut or damaged, another kind of file, or holds no tensors.
    """
    path = Path(path)
    opening = _opening(path)
    if opening[8:9] == b"{":  # after the length of a header
        return {"": _read_safetensors(path)}
    if opening.startswith(_ZIP):
        _check_archive(path)
    elif not opening.startswith(b"\x80"):  # of a bare pickle
        raise ValueError(f"{path} is {_what_it_is(path, opening)}")
    groups = dict(_groups(_read_torch(path)))
    if not groups:
        raise ValueError(f"{path} holds no state dict (name -> tensor)")
    return groups


def is_array_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is NumPy's `.npz`, as those that JAX wrote; errors as `read_state_dicts`."""
    path = Path(path)
    return _opening(path).startswith(_ZIP) and all(n.endswith(".npy") for n in _members(path))


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is {_CUT}") from error


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that `torch.save` did not write."""
    names = {name.rpartition("/")[2] for name in _members(path)}
    if "constants.pkl" in names:
        raise ValueError(
            f"{path} is a TorchScript program; torch.save the state_dict() of what "
            "torch.jit.load makes of it, and name that"
        )
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive; unpack it and name the file in it")


def own_kind(path: str | os.PathLike[str]) -> str | None:
    """The kind of a file that this package wrote, as `"task"`; `None` of any other.

    Raises:
        ValueError: no such file, or a safetensors file that is cut or damaged.
    """
    return kind_of(metadata_of(path)) if is_safetensors(path) else None


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file opens as safetensors do; `ValueError` if there is none."""
    return _opening(Path(path))[8:9] == b"{"


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says of itself; errors as `own_kind`."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is {_CUT}") from error


def _opening(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file in it")
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    with open(path, "rb") as file:
        return file.read(512)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    kind = kind_of(metadata_of(path))
    if kind == "task":
        raise ValueError(
            f"{path} is a task file, which holds what was trained and no base model; "
            "name the weights that it was trained on (to use a task as a base, merge it first)"
        )
    if kind is not None:
        name = "what a run trained" if kind == "trained" else f"a {kind} file"
        raise ValueError(f"{path} is {name}, not weights; name the base model's")
    tensors = load_file(path)
    if not tensors:
        raise ValueError(f"{path} holds no state dict (name -> tensor)")
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        # of an open file: by its name torch would take it for another kind
        with open(path, "rb") as file, torch.serialization.safe_globals(_SAFE):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _foreign_names(path, str(error))
        if not foreign:
            raise ValueError(f"{path} is {_CUT}") from error
        raise ValueError(
            f"{path} holds more than tensors ({', '.join(foreign)}), and unpickling that "
            "can run any code. If you trust the file, load it with torch.load(FILE, "
            "weights_only=False), torch.save the state dict in it alone, and name that file"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is {_CUT}") from error


def _foreign_names(path: Path, message: str) -> list[str]:
    """What a pickle would import beyond tensors; files before torch 1.6 tell the first alone."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        return re.findall(r"GLOBAL ([\w.]+\w) was not an allowed global", message)


def _groups(value: object, where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, Mapping):
        return
    named = {name: inner for name, inner in value.items() if isinstance(name, str)}
    tensors = {name: inner for name, inner in named.items() if isinstance(inner, Tensor)}
    if tensors:
        yield where, tensors
    if depth < _DEPTH:
        for name, inner in named.items():
            yield from _groups(inner, f"{where}.{name}".lstrip("."), depth + 1)


def _what_it_is(path: Path, opening: bytes) -> str:
    if not opening:
        return "empty; fetch it again"
    for start, what in _OPENINGS.items():
        if opening.lstrip().startswith(start):
            return what
    if path.suffix == ".safetensors":
        return "cut, damaged or no safetensors file; fetch it again"
    if not any(byte < 9 for byte in opening):
        return f"a text file; expected {FORMS}"
    return f"no file of weights, or damaged at its beginning; expected {FORMS}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the lines that are for its developers."""
    # a KeyError shows its text as code does, in quotes
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.split("\n")[0] if text else type(error).__name__
