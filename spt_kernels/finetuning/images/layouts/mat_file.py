"""MATLAB's files, in which several data sets list their images."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import needed


def read_mat(file: Path, *names: str) -> list[Any]:
    """The variables `names` of a `.mat` file, without the dimensions of one that MATLAB adds.

    Strings come as `str`, numbers as such, cells and arrays as one-dimensional arrays, a struct
    array as a structured one.

    Raises:
        ValueError: it cannot be read, or has no such variable.
        MissingExtra: scipy is not installed.
    """
    with needed(f"reading {file.name}"):
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

    try:
        found = loadmat(file, squeeze_me=True)
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise ValueError(f"{file}: cannot read the .mat file ({error})") from error
    if lacking := [name for name in names if name not in found]:
        own = ", ".join(name for name in found if not name.startswith("__"))
        raise ValueError(f"{file}: expected a variable {lacking[0]}, found {own or 'none'}")
    return [np.atleast_1d(found[name]) for name in names]
