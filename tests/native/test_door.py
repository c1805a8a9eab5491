"""What the door to the C++ says of itself: who checks, and who trusts."""

from __future__ import annotations

import inspect
import re

from spt_kernels import native

OF_THE_MODULE = {"available", "instruction_set", "limit_instruction_set", "why_unavailable"}
FOR_TESTS = {"top_tau_bytes_read"}


def test_every_function_is_said_to_check_or_to_trust() -> None:
    checking, trusting = str(native.__doc__).split("Nothing is checked by")
    public = {name for name in native.__all__ if inspect.isfunction(getattr(native, name))}
    launching = {name for name in public if name.startswith("launch_")}
    names = public - launching - OF_THE_MODULE - FOR_TESTS
    assert names == {name for name in re.findall(r"`(\w+)`", checking) if name in public}
    assert launching <= set(re.findall(r"`(\w+)`", trusting))


def test_what_checks_says_what_it_raises() -> None:
    for name in native.__all__:
        call = getattr(native, name)
        if inspect.isfunction(call) and "Tensor" in str(inspect.signature(call)):
            refuses = "Raises:\n        ValueError" in str(call.__doc__)
            assert refuses != (name.startswith("launch_") or name in FOR_TESTS), name
