"""Where memory runs out while adapters are exchanged, none is lost and the model is as it was."""

from __future__ import annotations

import copy
from pathlib import Path
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


def state_of(model: PeftModel) -> list[Any]:
    """What a user sees of its adapters, but for values."""
    tuner: Any = model.base_model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapters = tuner.spt.on_model, {*tuner.spt.aside}, tuner.spt.merged_adapters
    return [flags, [*model.peft_config], tuner.active_adapters, *adapters]


def add(model: Any, folder: Path) -> None:
    model.add_adapter("third", SptConfig(plan=plan(500, "lora", 1)))


@pytest.mark.parametrize(
    "action",
    [
        add,
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.base_model.set_adapter("other"),
        lambda model, folder: model.set_requires_grad("other"),
        lambda model, folder: model.delete_adapter("default"),
    ],
    ids=["add", "save", "set", "flags", "delete"],
)
@pytest.mark.parametrize("is_merged", [False, True], ids=["tuned", "merged"])
def test_what_fails_changes_nothing(action: Any, is_merged: bool, tmp_path: Path) -> None:
    model = two_adapters()
    reference = copy.deepcopy(model)
    if is_merged:
        model.merge_adapter()
    before, expected = state_of(model), output(model)
    for _ in range(2):  # the second time some things are known
        twin = copy.deepcopy(model)
        count = allocations(lambda twin=twin: action(twin, tmp_path))
    for refused in range(0, count, count // 12 + 1):
        with running_out(range(refused, 9 * count)):
            action(model, tmp_path)
        assert state_of(model) == before
        assert torch.equal(output(model), expected)
    action(model, tmp_path)
    for each in (model, reference):
        each.set_adapter("other")
    assert torch.equal(output(model), output(reference))
