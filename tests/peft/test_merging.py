"""An adapter merged into the weights: for good, or for a while with an exact way back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model

import spt_kernels as spt
from spt_kernels.peft import SptConfig
from tests.models import tiny_vit

from .small import output, plan, same_parameters, step, train, wrapped


@pytest.mark.parametrize("structured", ["lora", None])
def test_merged_it_is_a_plain_model(structured: str | None) -> None:
    model = train(wrapped(structured))
    tuned = output(model)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(output(merged), tuned)
    assert [type(m) for m in merged.modules()] == [type(m) for m in tiny_vit().modules()]
    assert not hasattr(merged, "peft_config")
    again = get_peft_model(merged, SptConfig(plan=plan()))
    assert torch.equal(output(again), output(merged))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_for_a_while_it_is_plain_and_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_vit().to(dtype), SptConfig(plan=plan()))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2)
    step(model, optimizer, 2)
    tuned, before = output(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    inner = model.get_base_model()
    assert [type(m) for m in inner.modules()] == [type(m) for m in tiny_vit().modules()]
    assert not any(p.requires_grad for p in model.parameters())
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output(model), tuned, atol=atol, rtol=0)
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    step(model, optimizer)
    assert not torch.equal(output(model), tuned)
    assert same_parameters(model.unload(), tiny_vit().to(dtype))


def test_what_is_done_while_it_is_merged(tmp_path: Path) -> None:
    model = train(wrapped())
    tuned = output(model)
    model.merge_adapter(safe_merge=True)
    merged = output(model)
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    assert model.get_model_status().merged_adapters == ["default"]
    assert torch.equal(output(model), merged)
    assert torch.equal(output(PeftModel.from_pretrained(tiny_vit(), tmp_path)), tuned)
    with model.disable_adapter():
        assert torch.equal(output(model), output(tiny_vit()))
        with pytest.raises(ValueError, match="is disabled"):
            model.merge_adapter()
    assert torch.equal(output(model), tuned)
    model.merge_adapter()
    model.set_adapter("other")
    assert torch.equal(output(model), output(tiny_vit()))
    model.set_adapter("default")
    model.merge_adapter()
    assert torch.equal(output(model.merge_and_unload()), merged)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        wrapped().unmerge_adapter()


def test_merged_for_good_or_unloaded_while_it_is_disabled() -> None:
    tuned = output(train(wrapped()))
    model = train(wrapped())
    with model.disable_adapter():
        merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), tuned, rtol=1e-4, atol=1e-5)
    model = train(wrapped())
    with model.disable_adapter():
        plain = model.unload()
    assert torch.equal(output(plain), output(tiny_vit()))


def test_an_adapter_is_not_merged() -> None:
    model = train(wrapped("adapter"))
    tuned = output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="an Adapter is not linear"):
            merge()
        assert torch.equal(output(model), tuned)


def test_a_safe_merge_finds_what_is_not_finite() -> None:
    model = wrapped()
    next(p for p in model.parameters() if p.requires_grad and p.ndim == 1).data[0] = torch.nan
    with pytest.raises(ValueError, match="safe_merge: adapter 'default' has NaN"):
        model.merge_and_unload(safe_merge=True)
    assert model.active_adapters == ["default"]
    assert hasattr(model.get_base_model(), "spt_tuning")
