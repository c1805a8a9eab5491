"""What an offloaded model cannot be asked for is said in one clear error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spt_kernels as spt
from spt_kernels.offloading import blocks_on_host
from tests.models import tiny_batch, tiny_resnet, tiny_vit
from tests.quantized import quantize

from .runs import assert_same, loss_of, sparse, there, train, tuned, values_of


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"what": "all"}, ValueError, "what must be one of frozen, forward-only, nothing, got"),
        ({"keep_bytes": -1}, ValueError, "keep_bytes must be at least 0, got -1"),
        ({"keep_bytes": 1.5}, TypeError, "keep_bytes must be a whole number, got 1.5"),
        ({"ahead": True}, TypeError, "ahead must be a whole number, got True"),
        ({"device": "mps"}, ValueError, "device must be 'cpu' or a CUDA device, got mps"),
        ({"device": "nowhere"}, ValueError, "device must be 'cpu' or a CUDA device, got 'nowhere'"),
    ],
)
def test_arguments(how: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tuned("linear")
    with pytest.raises(error, match=message):
        spt.offload(model, **how)
    assert not blocks_on_host(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_card_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="expected one that there is, got cuda"):
        spt.offload(tuned("linear"), device="cuda")


@pytest.mark.parametrize("count", [2, 4])
def test_a_card_too_many_leaves_a_model_offloaded(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("no such card")

    model = tuned("linear")
    spt.offload(model)
    before, made = list(blocks_on_host(model)), model.spt_offload
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "Stream", fail)
    with pytest.raises((ValueError, RuntimeError), match=r"one of 2 CUDA devices|no such card"):
        spt.offload(model, device="cuda:3")
    assert model.spt_offload is made
    assert blocks_on_host(model) == before
    loss_of(model, 0)


@pytest.mark.parametrize(
    ("make", "what", "message"),
    [
        (lambda: "vit", "frozen", "model must be an nn.Module, got str"),
        (lambda: tuned("full"), "frozen", "expected blocks with frozen matrices of their own"),
        (lambda: nn.Linear(3, 3), "frozen", "expected blocks with frozen matrices of their own"),
        (lambda: tuned("lora-1"), "forward-only", "what='frozen' offloads the others"),
        (lambda: nn.DataParallel(tuned("linear")), "frozen", "wrapped in a DataParallel"),
        (lambda: nn.Sequential(), "frozen", "expected all of it on one device, got none"),
        (lambda: quantize(tiny_vit()), "frozen", "is quantized to .*: quantized weights stay"),
    ],
)
def test_models(make: Any, what: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        spt.offload(make(), what)


def test_a_quantized_model_has_nothing_to_bring_back() -> None:
    assert not spt.offload(quantize(tuned("lora-1")), "nothing").streamed


def test_a_part_that_is_compiled_or_offloaded() -> None:
    model = tuned("linear")
    model.blocks[0]._compiled_call_impl = lambda *_: None  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="a part of it is compiled"):
        spt.offload(model)
    model = nn.Sequential(tuned("linear"))
    spt.offload(model[0])
    with pytest.raises(ValueError, match="a VisionTransformer within it is offloaded by itself"):
        spt.offload(model)


def test_what_an_offloaded_model_is_no_good_for() -> None:
    model = tuned("spt-lora")
    spt.offload(model)
    expected = train(tuned("spt-lora"))
    back = r"spt\.offload\(model, 'nothing'\)"
    with pytest.raises(ValueError, match=f"a copy of it would have no weights.*{back}"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"cannot be pickled.*{back}"):
        pickle.dumps(model)
    with pytest.raises(ValueError, match=f"{back} before load_state_dict"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=f"{back} to account for it"):
        spt.estimate_memory(model, (1, 3, 16, 16))
    with pytest.raises(ValueError, match=f"{back} to capture a step of it"):
        spt.capture_step(model, F.cross_entropy, sparse(model), tiny_batch())
    loss_of(model, 0).backward()
    rounding = spt.SparseAdamW(spt.param_groups(model), stochastic_rounding=True)
    with pytest.raises(ValueError, match="stochastic_rounding: expected False for deltas whose"):
        rounding.step()
    model.zero_grad()
    assert_same(train(model), expected)
    plain = tiny_vit().requires_grad_(False)
    spt.offload(plain)
    for use in (
        lambda: spt.measure_sensitivity(plain, [tiny_batch()], num_samples=4),
        lambda: spt.TaskBank(plain),
        lambda: spt.methods["lora-1"](plain),
    ):
        with pytest.raises(ValueError, match=f"offloaded: bring its weights back with {back}"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), "was moved, cast or replaced since"),
        (lambda model: model.blocks[0].mlp.fc1.to(torch.bfloat16), "fc1.weight is offloaded"),
        (lambda model: model.requires_grad_(True), "requires a gradient since"),
    ],
)
def test_a_model_that_is_changed_meanwhile(change: Any, message: str) -> None:
    model = tuned("linear")
    spt.offload(model)
    change(model)
    images = tiny_batch()[0].to(next(model.parameters()).dtype)
    with pytest.raises(RuntimeError, match=message):
        model(images)


def test_a_layer_that_is_called_outside_of_its_block() -> None:
    model = tuned("linear")
    spt.offload(model)
    with pytest.raises(RuntimeError, match=r"blocks.1.mlp.fc1.weight is .* outside of whose"):
        model.blocks[1].mlp.fc1(torch.randn(2, 24))  # type: ignore[index,union-attr]


def test_autocast_within_a_call_without_it() -> None:
    model = tuned("linear")
    spt.offload(model)
    block = model.blocks[0]  # type: ignore[index]

    def again(*_: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            block(torch.randn(1, 17, 24))

    block.mlp.register_forward_hook(again)
    with pytest.raises(RuntimeError, match="under autocast within a call without it"):
        loss_of(model, 0)
    assert there(model) == []


def test_weights_are_the_same_after_a_change_in_place() -> None:
    model, other = tuned("linear"), tuned("linear")
    spt.offload(model)
    for each in (model, other):
        train(each, autocast=True, steps=1)
        with torch.no_grad():
            each.blocks[0].mlp.fc1.weight.mul_(2)  # type: ignore[index,union-attr]
        train(each, autocast=True, steps=1)
    assert_same(([], values_of(model)), ([], values_of(other)))
    assert_same(train(model), train(other))


def test_convolutions_without_transformers_blocks() -> None:
    model, other = tuned("linear", tiny_resnet()), tuned("linear", tiny_resnet())
    spt.offload(model)
    assert_same(train(model, size=32), train(other, size=32))
