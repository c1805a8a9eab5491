"""What PEFT asks of every method, asked of SPT: train, disable, switch, unload, refuse."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")

from peft import (
    LoraConfig,
    PeftType,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
)

import spt_kernels as spt
from spt_kernels.errors import MissingExtra
from spt_kernels.peft import SptConfig, SptModel
from spt_kernels.peft.registration import register
from tests.models import tiny_vit
from tests.quantized import quantize

from .small import IMAGES, LABELS, output, plan, same_parameters, step, train, wrapped


def test_a_new_adapter_changes_no_output_and_trains_what_the_plan_says() -> None:
    model = wrapped()
    assert isinstance(model.base_model, SptModel)
    assert torch.equal(output(model), output(tiny_vit()))
    head = sum(p.numel() for p in tiny_vit().head.parameters())
    assert model.get_nb_trainable_parameters()[0] == plan().num_trainable + head


def test_it_trains_as_the_same_plan_does_without_peft() -> None:
    torch.manual_seed(0)
    model = wrapped()
    torch.manual_seed(0)
    bare = spt.apply(tiny_vit(), plan())
    for each in (model, bare):
        step(each, spt.SparseAdamW(spt.param_groups(each), lr=1e-2), 3)
    assert torch.equal(output(model), output(bare))


def test_training_changes_what_the_plan_names_and_nothing_else() -> None:
    model = train(wrapped())
    base = dict(tiny_vit().named_parameters())
    now = dict(model.get_base_model().named_parameters())
    positions = plan().unstructured
    for name, before in base.items():
        is_changed = (now[name] != before).reshape(-1)
        if name.startswith("head."):
            assert bool(is_changed.any())
        elif name in positions:
            expected = torch.zeros_like(is_changed)
            expected[positions[name]] = True
            assert not bool((is_changed & ~expected).any()), name
            assert bool(is_changed.any()), name
        else:
            assert not bool(is_changed.any()), name


@pytest.mark.parametrize("structured", ["lora", "adapter", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_it_is_the_base_model(structured: str | None, dtype: torch.dtype) -> None:
    base = tiny_vit().to(dtype)
    model = get_peft_model(tiny_vit().to(dtype), SptConfig(plan=plan(structured=structured)))
    tuned = output(train(model))
    assert not torch.equal(tuned, output(base))
    with model.disable_adapter():
        assert torch.equal(output(model), output(base))
        assert same_parameters(model.get_base_model(), base)
        assert model.get_model_status().enabled is False
    assert torch.equal(output(model), tuned)


def test_an_optimizer_stays_valid_while_adapters_are_disabled_and_switched() -> None:
    torch.manual_seed(0)
    models = [wrapped() for _ in range(2)]
    state = models[0].state_dict()
    models[1].load_state_dict(state)
    optimizers = [spt.SparseAdamW(spt.param_groups(m), lr=1e-2) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 2)
    models[1].add_adapter("other", SptConfig(plan=plan(600, None)))
    models[1].set_adapter("other")
    train(models[1])
    models[1].set_adapter("default")
    with models[1].disable_adapter():
        output(models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 2)
    assert torch.equal(output(models[0]), output(models[1]))


@pytest.mark.parametrize("optimizer_class", [spt.SparseAdamW, torch.optim.AdamW])
def test_neither_gradients_nor_steps_of_an_adapter_reach_others(optimizer_class: Any) -> None:
    model = wrapped()
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    optimizer = optimizer_class(spt.param_groups(model), lr=1e-2)
    step(model, optimizer)
    head: Any = model.get_base_model().head
    F.cross_entropy(model(IMAGES), LABELS).backward()
    gradient = head.weight.grad.clone()
    with model.disable_adapter():
        optimizer.step()
        assert torch.equal(output(model), output(tiny_vit()))
    model.set_adapter("other")
    assert head.weight.grad is None
    optimizer.step()
    assert torch.equal(output(model), output(tiny_vit()))
    model.set_adapter("default")
    assert torch.equal(head.weight.grad, gradient)


def test_a_forward_of_the_base_comes_before_that_which_is_trained() -> None:
    model = wrapped()
    with torch.no_grad(), model.disable_adapter():
        reference = model(IMAGES)
    (model(IMAGES) - reference).square().sum().backward()
    trained = model(IMAGES).sum()
    with model.disable_adapter():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained.backward()


def test_it_trains_on_after_a_look_at_the_base_in_inference_mode() -> None:
    model = wrapped()
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2)
    step(model, optimizer)
    tuned = output(model)
    with torch.inference_mode(), model.disable_adapter():
        assert torch.equal(output(model), output(tiny_vit()))
    assert torch.equal(output(model), tuned)
    step(model, optimizer)
    assert not torch.equal(output(model), tuned)


def test_the_state_dict_of_the_base() -> None:
    model = train(wrapped())
    with model.disable_adapter():
        found = {name: t.clone() for name, t in get_base_model_state_dict(model).items()}
    expected = tiny_vit().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_take_turns() -> None:
    model = train(wrapped())
    first = output(model)
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    assert torch.equal(output(model), first)
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert torch.equal(output(model), output(tiny_vit()))
    second = output(train(model))
    assert not torch.equal(second, first)
    for name, expected in (("default", first), ("other", second)):
        model.set_adapter(name)
        assert torch.equal(output(model), expected)
        assert model.get_model_status().active_adapters == [name]
        assert model.get_model_status().available_adapters == ["default", "other"]
    merged = model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(output(merged), first)


def test_only_the_active_adapter_is_trainable_and_only_if_it_is_wanted() -> None:
    model = wrapped()
    ours = {id(p) for p in model.parameters() if p.requires_grad}
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    assert {id(p) for p in model.parameters() if p.requires_grad} == ours
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("other")
    head = sum(p.numel() for p in tiny_vit().head.parameters())
    assert model.get_nb_trainable_parameters()[0] == 600 + head
    model.set_adapter("default")
    assert {id(p) for p in model.parameters() if p.requires_grad} == ours


def test_a_deleted_adapter_is_gone_and_another_takes_its_place() -> None:
    model = train(wrapped())
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    with pytest.warns(UserWarning, match="other is so now"):
        model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert torch.equal(output(model), output(tiny_vit()))
    with pytest.raises(ValueError, match="default"):
        model.set_adapter("default")
    model.add_adapter("default", SptConfig(plan=plan()))
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    model.delete_adapter("other")
    assert same_parameters(model.base_model.model, tiny_vit())


def test_unloaded_it_is_the_base_model() -> None:
    model = train(wrapped(modules_to_save=["patch_embed.proj"]))
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    base = model.unload()
    assert same_parameters(base, tiny_vit())
    assert all(p.requires_grad for p in base.parameters())


def test_modules_to_save_are_trained_whole() -> None:
    model = train(wrapped(modules_to_save=["patch_embed.proj"]))
    before = tiny_vit().patch_embed.proj
    after = model.get_base_model().patch_embed.proj
    assert bool((after.weight != before.weight).all())
    with model.disable_adapter():
        assert torch.equal(after.weight, before.weight)


def test_peft_takes_over_a_model_that_is_tuned(tmp_path: Path) -> None:
    first = train(wrapped(modules_to_save=["patch_embed.proj"]))
    spt.save_delta(first, tmp_path / "task")
    bare = spt.load_delta(tiny_vit(), tmp_path / "task")
    model = get_peft_model(bare, SptConfig(modules_to_save=["patch_embed.proj"]))
    assert model.peft_config["default"].plan == bare.spt_tuning.plan
    assert torch.equal(output(model), output(first))
    train(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(tiny_vit()))
    assert same_parameters(model.unload(), tiny_vit())


def test_copies_are_adapters_of_their_own() -> None:
    model = train(wrapped())
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    model.set_adapter("other")
    model.set_adapter("default")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(train(wrapped())))):
        tuned = output(twin)
        step(twin, spt.SparseAdamW(spt.param_groups(twin), lr=1e-2))
        assert not torch.equal(output(twin), tuned)
        with twin.disable_adapter():
            assert torch.equal(output(twin), output(tiny_vit()))


@pytest.mark.parametrize("is_merged", [False, True], ids=["tuned", "merged"])
def test_adapters_of_an_offloaded_model_stay_where_they_are(is_merged: bool) -> None:
    model = train(wrapped())
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    if is_merged:
        model.merge_adapter()
    expected = output(model)
    spt.offload(model)
    refused: list[Callable[[], object]] = [
        lambda: model.set_adapter("other"),
        lambda: model.disable_adapter().__enter__(),
        lambda: model.add_adapter("third", SptConfig(plan=plan(600, None))),
        model.unload,
        *([model.unmerge_adapter] if is_merged else [model.merge_adapter]),
    ]
    for change in refused:
        with pytest.raises(ValueError, match="the model is offloaded: bring its weights back"):
            change()
        assert torch.equal(output(model), expected)
    spt.offload(model, "nothing")
    model.set_adapter("other")
    model.set_adapter("default")
    assert torch.allclose(output(model), expected, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(output(model), output(tiny_vit()))


@pytest.mark.parametrize("on", ["default", "other"])
def test_several_adapters_go_through_a_pickle(on: str) -> None:
    model = train(wrapped())
    model.add_adapter("other", SptConfig(plan=plan(600, None)))
    model.set_adapter("other")
    train(model)
    model.set_adapter(on)
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), expected)
        for name in ("default", "other"):
            twin.set_adapter(name)
            model.set_adapter(name)
            assert torch.equal(output(twin), output(model))
            step(twin, spt.SparseAdamW(spt.param_groups(twin), lr=1e-2))
            assert not torch.equal(output(twin), output(model))
        model.set_adapter(on)
    assert torch.equal(output(model), expected)


def test_a_task_dropped_behind_its_back_is_noticed() -> None:
    model = wrapped()
    spt.unload(model.get_base_model())
    with (
        pytest.raises(ValueError, match="the model is not tuned, or no longer"),
        model.disable_adapter(),
    ):
        pass
    with pytest.raises(ValueError, match="its task was merged or dropped behind the PeftModel"):
        model.set_adapter("default")


def test_a_plan_for_another_model_leaves_it_alone() -> None:
    other = tiny_vit(width=36)
    with pytest.raises(spt.BaseModelMismatch):
        get_peft_model(other, SptConfig(plan=plan()))
    assert same_parameters(other, tiny_vit(width=36))
    model = train(wrapped())
    tuned = output(model)
    alien = dataclasses.replace(plan(), head=("nowhere.weight",), head_source="given")
    with pytest.raises(spt.BaseModelMismatch):
        model.add_adapter("other", SptConfig(plan=alien))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), tuned)


def refused(action: Any, error: type[Exception], match: str) -> Any:
    return pytest.param(action, error, match, id=match)


@pytest.mark.parametrize(
    ("action", "error", "match"),
    [
        refused(lambda m: m(IMAGES, adapter_names=["default"] * 4), ValueError, "adapter_names: "),
        refused(lambda m: m.base_model.set_adapter(["default", "b"]), ValueError, "one adapter"),
        refused(lambda m: m.merge_and_unload(adapter_names=["a", "b"]), ValueError, "of one"),
        refused(lambda m: m.merge_adapter(["other"]), ValueError, "no adapter 'other'"),
        refused(lambda m: m.merge_adapter(["default", "b"]), ValueError, "got .*'b'"),
        refused(lambda m: m.add_adapter("x", SptConfig()), ValueError, "plan: expected a Plan"),
        refused(lambda m: m.add_adapter("x", LoraConfig()), ValueError, "different peft types"),
        refused(
            lambda m: m.add_adapter("x", SptConfig(plan=plan()), low_cpu_mem_usage=True),
            ValueError,
            "low_cpu_mem_usage: ",
        ),
        refused(lambda m: spt.merge(m), ValueError, "merge_and_unload"),
        refused(lambda m: spt.unload(m), ValueError, r"model\.unload"),
    ],
)
def test_what_has_no_exact_meaning_is_refused_by_name(
    action: Any, error: type[Exception], match: str
) -> None:
    model = train(wrapped())
    tuned = output(model)
    with pytest.raises(error, match=match):
        action(model)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), tuned)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda c: get_peft_model(tiny_vit(), c, low_cpu_mem_usage=True), "low_cpu_mem_usage: "),
        (lambda c: get_peft_model(tiny_vit(), c, mixed=True), "not compatible"),
        (lambda c: inject_adapter_in_model(c, tiny_vit()), "use `get_peft_model`"),
    ],
)
def test_other_ways_in_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(SptConfig(plan=plan()))


@pytest.mark.parametrize(
    ("names", "match"),
    [(["nowhere"], "ends in 'nowhere'"), (["attn.qkv"], "qkv.*of which the plan trains a part")],
)
def test_modules_to_save_that_cannot_be_are_named(names: list[str], match: str) -> None:
    base = tiny_vit()
    with pytest.raises(ValueError, match=f"modules_to_save: .*{match}"):
        get_peft_model(base, SptConfig(plan=plan(), modules_to_save=names))
    assert same_parameters(base, tiny_vit())


def test_peft_knows_the_method() -> None:
    assert PeftType("SPT") in list(PeftType)
    assert pickle.loads(pickle.dumps(PeftType("SPT"))) is PeftType("SPT")
    assert wrapped().get_model_status().peft_types == {"default": "SPT"}


def test_an_older_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_kernels.peft.registration._HOOKS", ("_not_there_yet",))
    with pytest.raises(ImportError, match=r"needs PEFT 0\.21 or newer, got"):
        register(SptConfig, SptModel)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("spt_kernels.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtra, match=r"peft needs peft: pip install 'spt_kernels\[peft\]'"):
        importlib.import_module("spt_kernels.peft")


def test_a_quantized_base_is_refused_by_name() -> None:
    model = quantize(tiny_vit())
    with pytest.raises(ValueError, match=r"qkv\.weight is quantized to RowScaled, and an SptModel"):
        get_peft_model(model, SptConfig(plan=plan()))
    assert not hasattr(model, "spt_tuning")
