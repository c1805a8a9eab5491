"""Where memory runs out while adapters are exchanged, none is lost and the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel

from spt_kernels.peft import SptConfig
from tests.short_memory import allocations, running_out

from .small import output, plan, train, wrapped


def two_adapters() -> PeftModel:
    model = train(wrapped())
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    model.set_adapter("other")
    train(model)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("name", ["other", None])
def test_no_adapter_is_lost(is_merged: bool, name: str | None) -> None:
    model = two_adapters()
    tuner: Any = model.base_model

    def ready() -> None:
        tuner.spt.put_on(tuner.model, "default")
        if is_merged:
            tuner.merge_adapter()

    ready()
    count = allocations(lambda: tuner.spt.put_on(tuner.model, name))
    after = output(model)
    ready()
    before = output(model)
    for refused in range(count):
        with running_out(range(refused, 9 * count)):
            tuner.spt.put_on(tuner.model, name)
        assert (tuner.spt.on_model, set(tuner.spt.aside)) == ("default", {"other"})
        assert tuner.spt.merged_adapters == (["default"] if is_merged else [])
        assert torch.equal(output(model), before)
    tuner.spt.put_on(tuner.model, name)
    assert torch.equal(output(model), after)
    assert not torch.equal(after, before)
    ready()
    assert torch.equal(output(model), before)
