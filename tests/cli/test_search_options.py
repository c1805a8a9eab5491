"""The options of NOAH's search, beside an architecture that was found before."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_kernels.cli.training_options import MethodOptions


@pytest.mark.parametrize("option", ["supernet_epochs", "generations"])
def test_options_of_a_search_that_will_not_be_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: with --architecture nothing is searched"):
        MethodOptions(architecture=Path("found.json"), **{option: 3}).given()
