"""A package whose files are imported when their names are used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PACKAGE = """
from spt_kernels.files.first_use import names_on_first_use

__getattr__ = names_on_first_use(__name__, {"height": "mountain"})
"""


def test_a_file_is_imported_with_the_first_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "spt_tests_range"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "mountain.py").write_text("height = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import spt_tests_range as made  # type: ignore[import-not-found]

    try:
        assert "spt_tests_range.mountain" not in sys.modules
        with pytest.raises(AttributeError, match="'spt_tests_range' has no attribute 'depth'"):
            _ = made.depth
        height = made.height
        assert vars(made)["height"] is height is sys.modules["spt_tests_range.mountain"].height
    finally:
        for name in [name for name in sys.modules if name.startswith("spt_tests_range")]:
            del sys.modules[name]
