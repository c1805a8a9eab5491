"""`approximate` on whole models: exact forwards, labels, the way back, tuning before and after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.approximation import Approximation, parse_approximation
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit

BOTH: dict[str, Any] = {"gelu": "2bit", "layer_norm": "from-output"}


def gradients(model: nn.Module, run: nn.Module | None = None) -> dict[str, Tensor]:
    images, labels = tiny_batch()
    model.zero_grad()
    loss = nn.functional.cross_entropy((model if run is None else run)(images), labels)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all gradients as one vector, relative."""
    assert one.keys() == other.keys()
    difference = sum(float((one[n] - other[n]).square().sum()) for n in one)
    return (difference / sum(float(g.square().sum()) for g in one.values())) ** 0.5


def sparse_plan(model: nn.Module) -> spt.Plan:
    return spt.allocate(skewed_sensitivity(model), 2_000, structured=None)


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "size", "activations", "norms"),
    [
        (tiny_vit, 16, 2, 5),
        (tiny_swin, 32, 4, 11),
        (tiny_convnext, 32, 4, 4),
        (transformers_vit, 32, 2, 5),
    ],
)
def test_the_forward_of_every_family_is_exact(
    make: Callable[[], nn.Module], size: int, activations: int, norms: int
) -> None:
    model, images = make().eval(), torch.randn(2, 3, size, size)

    def output() -> Tensor:
        found = model(images)
        return found if isinstance(found, Tensor) else found[0]

    plain = output().detach()
    assert spt.approximate(model, **BOTH) is model
    label: Approximation = model.spt_approximation  # type: ignore[assignment]
    assert (len(label.activations), len(label.norms)) == (activations, norms)
    modules = dict(model.named_modules())
    assert all("forward" in vars(modules[name]) for name in (*label.activations, *label.norms))
    found = output()
    assert torch.equal(found, plain)
    nodes, seen = [found.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [below for below, _ in node.next_functions]
    names = [node.name() for node in seen if node is not None]
    assert names.count("EncodedActivationBackward") == activations
    assert names.count("LayerNormFromOutputBackward") == norms
    with torch.no_grad():
        assert torch.equal(output(), plain)


def test_gradients_by_bits_and_the_way_back() -> None:
    model = tiny_vit()
    exact = gradients(model)
    types = {name: type(module) for name, module in model.named_modules()}
    errors = {}
    for how in ({"gelu": "2bit"}, {"gelu": "8bit"}, {"layer_norm": "from-output"}, BOTH):
        spt.approximate(model, **how)
        errors[str(how)] = distance(exact, gradients(model))
    two, eight, norms, both = errors.values()
    assert eight < 0.005 < two < 0.3
    assert 0 < norms < 0.001
    assert both == pytest.approx(two, rel=0.05)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert model.spt_approximation.summary() == (
        "approximate gradients: derivatives of 2 activations in 2 bits, 5 LayerNorms from their "
        "output in 16 bits"
    )
    spt.approximate(model)
    assert not hasattr(model, "spt_approximation")
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(exact[n], g) for n, g in gradients(model).items())


def test_before_and_after_apply_are_the_same() -> None:
    base = tiny_vit()
    plan = sparse_plan(base)
    assert any("norm" in name for name in plan.unstructured)
    after = spt.approximate(spt.apply(copy.deepcopy(base), plan), **BOTH)
    before = spt.apply(spt.approximate(base, **BOTH), plan)
    one, other = gradients(after), gradients(before)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    exact = gradients(spt.approximate(after))
    assert 0 < distance(exact, one) < 0.3


def test_copies_and_pickles_are_approximate_on_their_own() -> None:
    model = spt.approximate(spt.apply(tiny_vit(), sparse_plan(tiny_vit())), **BOTH)
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        spt.approximate(model)  # which the copy does not notice
        assert all(torch.equal(expected[n], g) for n, g in gradients(copied).items())
        block = copied.blocks[0]
        assert block.mlp.act.forward.follower is block.mlp.fc2
        spt.approximate(model, **BOTH)


def test_a_task_file_tells_and_merging_ends_it(tmp_path: Path) -> None:
    model = tiny_vit()
    plan = sparse_plan(model)
    spt.approximate(spt.apply(model, plan), gelu="8bit")
    spt.save_delta(model, tmp_path / "task.safetensors", metadata={"note": 1})
    told = spt.read_metadata(tmp_path / "task.safetensors")
    assert told == {"approximation": {"gelu": "8bit", "layer_norm": None}, "note": 1}
    spt.unload(model)
    assert hasattr(model, "spt_approximation")  # it is the model's, not the task's
    spt.load_delta(model, tmp_path / "task.safetensors")
    spt.merge(model)
    assert not hasattr(model, "spt_approximation")
    assert not any("forward" in vars(module) for module in model.modules())


def test_memory_is_accounted_below_the_exact_step() -> None:
    model = tiny_vit()

    def activations(dtype: str, **how: str) -> int:
        spt.approximate(model, **how)
        estimate = spt.estimate_memory(model, (16, 3, 16, 16), method="spt-lora", dtype=dtype)
        return estimate.by_category["activations"]

    eight = activations("fp32", gelu="8bit")
    assert activations("fp32", gelu="2bit") < eight < activations("fp32")
    for dtype in ("bf16-autocast", "bf16"):
        from_output = activations(dtype, layer_norm="from-output")
        assert (from_output < activations(dtype)) == (dtype != "bf16")


def test_compiled_it_is_one_graph_with_the_same_gradients() -> None:
    torch._dynamo.reset()
    model = spt.approximate(spt.apply(tiny_vit(depth=1), sparse_plan(tiny_vit(depth=1))), **BOTH)
    expected = gradients(model)
    found = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    # a compiler decides by itself what is kept of a tuned layer's input, which is then exact
    assert distance(expected, found) < 1e-3
    torch._dynamo.reset()


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model = spt.approximate(tiny_vit(), gelu="8bit")
    label = model.spt_approximation
    with pytest.raises(ValueError, match="gelu: expected '2bit', '8bit' or None, got '4bit'"):
        spt.approximate(model, gelu="4bit")
    with pytest.raises(ValueError, match="layer_norm: expected 'from-output' or None, got True"):
        spt.approximate(model, layer_norm=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gelu='2bit': Linear has no GELU, SiLU or QuickGELU"):
        spt.approximate(nn.Linear(2, 2), gelu="2bit")
    with pytest.raises(ValueError, match="layer_norm='from-output': Sequential has no LayerNorm"):
        spt.approximate(nn.Sequential(nn.GELU()), **BOTH)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        spt.approximate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compiled or wrapped"):
        spt.approximate(nn.DataParallel(model), gelu="2bit")
    with pytest.raises(ValueError, match="expected exact gradients, got approximate ones"):
        spt.measure_sensitivity(model, [tiny_batch()])
    assert model.spt_approximation is label


def test_a_forward_of_another_is_left_alone() -> None:
    model = tiny_vit()
    act = model.blocks[0].mlp.act
    act.forward = torch.relu
    spt.approximate(model, gelu="2bit")
    assert model.spt_approximation.activations == ("blocks.1.mlp.act",)
    spt.approximate(model)
    assert act.forward is torch.relu


def test_words_of_the_command_line() -> None:
    assert parse_approximation(None) == {}
    assert parse_approximation("gelu-8bit") == {"gelu": "8bit"}
    assert parse_approximation("gelu-2bit, layer-norm-from-output") == BOTH
    for wrong in ("", "gelu", "gelu-2bit,gelu-8bit", "gelu-2bit,"):
        with pytest.raises(ValueError, match="approximate: expected gelu-2bit, gelu-8bit, layer"):
            parse_approximation(wrong)
