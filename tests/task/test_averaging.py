"""Averages of tuned models: their task files fit the base, whatever averaging rounds in it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import spt_kernels as spt
from spt_kernels.plan import Plan
from tests.models import tiny_batch, tiny_vit
from tests.task.test_delta import (
    assert_same_picture,
    batch_norm_net,
    make_plan,
    picture,
    predict,
    tuned,
)

DECAY = 0.9


def rounding(average: Tensor, new: Tensor, *_: object) -> Tensor:
    return DECAY * average + (1 - DECAY) * new


class ParametersAlone(nn.Module):
    """The usual hand-written average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mean, new in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.mul_(DECAY).add_(new, alpha=1 - DECAY)


class OfTorch(AveragedModel):
    """torch's, as torchvision's reference scripts use it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, avg_fn=rounding)

    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)


AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "timm-v2": lambda model: ModelEmaV2(model, decay=DECAY),
    "timm-v3": lambda model: ModelEmaV3(model, decay=DECAY, foreach=False),
    "torch": OfTorch,
    "by-hand": ParametersAlone,
}
every_average = pytest.mark.parametrize("how", AVERAGES)


def averaged(model: nn.Module, how: str, size: int = 16, steps: int = 4) -> nn.Module:
    """Train a tuned model for a few steps, and average it on the way."""
    average = AVERAGES[how](model)
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.02, eps=1e-4)
    images, labels = tiny_batch(size=size)
    images = images.to(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
        average.update(model)  # type: ignore[operator]
    return average.module  # type: ignore[return-value]


def fresh(kind: str = "lora") -> nn.Module:
    model = tiny_vit()
    return spt.apply(model, make_plan(model, kind))


def rounded_names(model: nn.Module) -> list[str]:
    """Frozen parameters that an average no longer has as the base does."""
    base = dict(tiny_vit().named_parameters())
    return [
        name
        for name, p in model.named_parameters()
        if name in base and not p.requires_grad and not torch.equal(p, base[name])
    ]


@every_average
@pytest.mark.parametrize("kind", ["unstructured", "lora", "adapter"])
def test_the_task_of_an_average_fits_the_base(how: str, kind: str, tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", fresh(kind)
    average = averaged(model, how)
    if how in ("timm-v2", "torch", "by-hand"):
        assert "blocks.0.norm1.weight" in rounded_names(average)
    expected = predict(average, "vit")
    spt.save_delta(average, path)
    loaded = spt.load_delta(tiny_vit(), path)
    torch.testing.assert_close(predict(loaded, "vit"), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, predict(model, "vit"), rtol=1e-3)
    # what was rounded has its own values again, so that the average is the very same model
    assert torch.equal(predict(average, "vit"), predict(loaded, "vit"))
    assert_same_picture(spt.unload(average), picture(tiny_vit()))


@every_average
def test_unload_gives_the_base_of_an_average_back(how: str) -> None:
    model = fresh()
    average = averaged(model, how)
    trained = picture(model)
    assert_same_picture(spt.unload(average), picture(tiny_vit()))
    assert_same_picture(model, trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_average_within_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", tiny_vit().to(dtype)
    spt.apply(model, make_plan(model, "lora"))
    average = averaged(model, "timm-v2", steps=3)
    spt.save_delta(average, path)
    loaded = spt.load_delta(tiny_vit().to(dtype), path)
    assert torch.equal(predict(average, "vit"), predict(loaded, "vit"))
    assert_same_picture(spt.unload(average), picture(tiny_vit().to(dtype)))


@pytest.mark.gpu
def test_an_average_on_another_device(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", fresh().cuda()
    average = ModelEmaV2(model, decay=DECAY, device=torch.device("cpu"))
    for _ in range(4):
        average.update(model)
    assert rounded_names(average.module)
    spt.save_delta(average.module, path)
    spt.load_delta(tiny_vit(), path)
    assert_same_picture(spt.unload(average.module), picture(tiny_vit()))


def test_merge_folds_an_average_into_the_base_itself() -> None:
    model = fresh("unstructured")
    average = averaged(model, "timm-v2")
    plan, rounded = make_plan(tiny_vit(), "unstructured"), rounded_names(average)
    merged = spt.merge(average)
    base = dict(tiny_vit().named_parameters())
    assert rounded
    for name in base.keys() - set(plan.head):
        same = merged.get_parameter(name).detach().eq(base[name]).flatten()
        same[plan.unstructured.get(name, torch.empty(0, dtype=torch.int64))] = True
        assert same.all(), name


@pytest.mark.parametrize("same", [True, False], ids=["same-structure", "another"])
def test_another_task_goes_onto_an_average(same: bool, tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", fresh("lora")
    average = averaged(model, "timm-v2")
    spt.save_delta(tuned("vit", "lora" if same else "adapter"), path)
    spt.load_delta(average, path)
    assert torch.equal(predict(average, "vit"), predict(spt.load_delta(tiny_vit(), path), "vit"))
    assert_same_picture(spt.unload(average), picture(tiny_vit()))


def test_a_head_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", tiny_vit()
    spt.apply(model, Plan({}, {}, {}, head=("head.weight", "head.bias")))
    average = averaged(model, "timm-v2")
    assert len(rounded_names(average)) > 10
    spt.save_delta(average, path)
    expected = predict(average, "vit")
    assert torch.equal(predict(spt.load_delta(tiny_vit(), path), "vit"), expected)


def test_running_statistics_are_averaged_too(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", batch_norm_net()
    base = picture(model)
    spt.apply(model, make_plan(model, "unstructured"))
    average = averaged(model.train(), "timm-v2")
    spt.save_delta(average, path)
    loaded = spt.load_delta(batch_norm_net(), path)
    name = "body.1.running_mean"
    assert torch.equal(loaded.get_buffer(name), average.get_buffer(name))
    assert not torch.equal(loaded.get_buffer(name), model.get_buffer(name))
    assert torch.equal(predict(loaded.eval(), "vit"), predict(average, "vit"))
    assert_same_picture(spt.unload(average), base)


@pytest.mark.parametrize("source", ["deleted", "pickled", "merged"])
def test_without_the_model_that_was_copied_it_is_told_when_saving(
    source: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "task.safetensors", fresh()
    plan = model.spt_tuning.plan
    average = averaged(model, "timm-v2")
    if source == "deleted":
        del model
    elif source == "merged":
        spt.merge(model)  # its weights are other ones now
    else:
        buffer = io.BytesIO()
        torch.save(average, buffer)
        buffer.seek(0)
        average = torch.load(buffer, weights_only=False)
    expected = predict(average, "vit")  # which writes the averaged deltas
    before = picture(average)
    for verb in (lambda model: spt.save_delta(model, path), spt.unload):
        with pytest.raises(ValueError, match=r"frozen, and yet .* spt\.apply\(base, model\.spt_t"):
            verb(average)
    assert_same_picture(average, before)
    assert not path.exists()
    # and what it says to do does it
    base = spt.apply(tiny_vit(), plan)
    trained = {n: p for n, p in average.named_parameters() if p.requires_grad}
    base.load_state_dict({**trained, **dict(average.named_buffers())}, strict=False)
    spt.save_delta(base, path)
    loaded = predict(spt.load_delta(tiny_vit(), path), "vit")
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-6)
    spt.merge(average)  # is what it computes, rounded or not
    torch.testing.assert_close(predict(average, "vit"), expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_parameter_that_was_trained_is_told_when_saving(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", fresh()
    model.pos_embed.requires_grad_(True)
    with torch.no_grad():
        model.pos_embed[0, 3, 5] += 1
    model.pos_embed.requires_grad_(False)
    with pytest.raises(ValueError, match=r"pos_embed is frozen, and yet .*requires_grad_\(True\)"):
        spt.save_delta(model, path)
    model.pos_embed.requires_grad_(True)
    spt.save_delta(model, path)
    assert torch.equal(predict(spt.load_delta(tiny_vit(), path), "vit"), predict(model, "vit"))


def test_an_average_in_half_precision_fits_either_base(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", fresh("unstructured")
    average = averaged(model, "timm-v3").bfloat16()
    spt.save_delta(average, path)
    expected = predict(average, "vit")
    assert torch.equal(predict(spt.load_delta(tiny_vit().bfloat16(), path), "vit"), expected)
    close = predict(spt.load_delta(tiny_vit(), path), "vit")
    torch.testing.assert_close(close, expected, rtol=0.05, atol=0.05)
    with pytest.raises(spt.BaseModelMismatch, match="expected float32 weights, got float16"):
        spt.load_delta(tiny_vit().half(), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_average_in_single_precision_fits_the_half_base(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """The way to average half precision, in which a small share of a value is nothing."""
    path, model = tmp_path / "task.safetensors", tiny_vit().to(dtype)
    spt.apply(model, make_plan(model, "unstructured"))
    average = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in average.parameters():
            if not parameter.requires_grad:
                parameter.mul_(1 + 2**-22)  # far below what the base could hold
            elif parameter.numel():
                parameter.add_(0.01)
    del model  # nothing is to be had from it
    expected = predict(average, "vit")
    spt.save_delta(average, path)
    for base in (tiny_vit().to(dtype), tiny_vit().to(dtype).float()):
        close = predict(spt.load_delta(base, path), "vit")
        torch.testing.assert_close(close, expected, rtol=0.1, atol=0.05)
    restored = spt.unload(average).state_dict()
    for name, tensor in tiny_vit().to(dtype).state_dict().items():
        assert torch.equal(restored[name], tensor.float()), name


def test_the_model_around_a_tuned_one_is_named(tmp_path: Path) -> None:
    average = ModelEmaV2(fresh())
    with pytest.raises(ValueError, match=r"a ModelEmaV2 around a tuned one: pass model\.module"):
        spt.save_delta(average, tmp_path / "task.safetensors")


def average_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """An average kept as a plain dict, of everything in it that has a point."""
    mean = {name: tensor.clone() for name, tensor in states[0].items()}
    for state in states[1:]:
        for name, tensor in state.items():
            mean[name] = rounding(mean[name], tensor)
    return mean


@pytest.mark.parametrize("kind", ["unstructured", "lora"])
def test_an_averaged_state_dict_leaves_the_base_as_it_is(kind: str, tmp_path: Path) -> None:
    """Positions and base values in it, averaged like all else, among them."""
    path, model = tmp_path / "task.safetensors", fresh(kind)
    states = []
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.02)
    images, labels = tiny_batch()
    for _ in range(4):
        states.append({n: t.detach().clone() for n, t in model.state_dict().items()})
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    mean = average_of(states)
    base = tiny_vit().state_dict()
    assert not torch.equal(mean["blocks.0.norm1.weight"], base["blocks.0.norm1.weight"])
    model.load_state_dict(mean)
    name = "blocks.1.norm1.weight_delta"
    assert torch.equal(model.state_dict()[name], mean[name])
    expected = predict(model, "vit")
    spt.save_delta(model, path)
    assert torch.equal(predict(spt.load_delta(tiny_vit(), path), "vit"), expected)
    assert_same_picture(spt.unload(model), picture(tiny_vit()))


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("kind", ["unstructured", "lora", "adapter"])
def test_the_weights_of_the_plain_base_leave_the_task_as_it_is(
    kind: str, assign: bool, tmp_path: Path
) -> None:
    path, model = tmp_path / "task.safetensors", tuned("vit", kind)
    expected = predict(model, "vit")
    plain = {n: t for n, t in tiny_vit().state_dict().items() if not n.startswith("head")}
    model.load_state_dict(plain, strict=False, assign=assign)
    assert torch.equal(predict(model, "vit"), expected)
    spt.save_delta(model, path)
    assert torch.equal(predict(spt.load_delta(tiny_vit(), path), "vit"), expected)
    assert_same_picture(spt.unload(model), picture(tiny_vit()))


def test_parameters_alone_do_not_tell_their_base() -> None:
    model = tuned("vit", "unstructured")
    everything = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = predict(model, "vit")
    same, other = (spt.apply(tiny_vit(seed), model.spt_tuning.plan) for seed in (0, 7))  # type: ignore[union-attr]
    same.load_state_dict(everything, strict=False)
    assert torch.equal(predict(same, "vit"), expected)
    before = picture(other)
    with pytest.raises(RuntimeError, match="may hold base \\+ delta or the base alone"):
        other.load_state_dict(everything, strict=False)
    assert_same_picture(other, before)
    # in two steps it is clear
    trained = {name: p for name, p in everything.items() if "delta" in name or "head" in name}
    other.load_state_dict(tiny_vit().state_dict(), strict=False)
    other.load_state_dict(trained, strict=False)
    assert torch.equal(predict(other, "vit"), expected)


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_a_checkpoint_brings_its_own_base(assign: bool, tmp_path: Path) -> None:
    """As for a model that is built without weights, because all of them are in the checkpoint."""
    path, model = tmp_path / "task.safetensors", tuned("vit", "lora")
    resumed = spt.apply(tiny_vit(7), make_plan(tiny_vit(7), "lora"))
    resumed.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    expected = predict(model, "vit")
    assert torch.equal(predict(resumed, "vit"), expected)
    average = averaged(resumed, "timm-v2", steps=2)
    for one in (resumed, average):
        spt.save_delta(one, path)
        loaded = predict(spt.load_delta(tiny_vit(), path), "vit")
        assert torch.equal(loaded, predict(one, "vit"))
    base = dict(tiny_vit().named_parameters())
    for name, parameter in spt.unload(average).named_parameters():
        if not name.startswith("head."):
            assert torch.equal(parameter, base[name]), name


@pytest.mark.parametrize("how", ["copied", "assigned"])
def test_an_average_of_a_model_with_other_parameter_objects(how: str, tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", fresh()
    if how == "copied":
        model = copy.deepcopy(copy.deepcopy(model))
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    average = copy.deepcopy(averaged(model, "timm-v2", steps=3))
    assert rounded_names(average)
    spt.save_delta(average, path)
    spt.load_delta(tiny_vit(), path)


def test_a_plain_model_watches_no_state_dicts() -> None:
    for verb in (spt.merge, spt.unload):
        model = verb(fresh())
        assert not model._load_state_dict_pre_hooks
        assert not model._load_state_dict_post_hooks
