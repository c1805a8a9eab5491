"""Tuned layers under torch.compile: one graph, the same gradients as without, and less kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

import spt_kernels as spt
from spt_kernels import AdapterSpec, LoraSpec, Plan, apply
from spt_kernels.layers import LoraLinear, SparseDeltaConv2d, SparseDeltaLinear, sparse_deltas
from spt_kernels.layers.autograd import lora_launches
from spt_kernels.model import describe, head_names
from spt_kernels.ops.launching import as_on_card
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit


@pytest.fixture(autouse=True)
def _fresh_dynamo():  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: nn.Module, run: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_whole_vit_with_everything_on_it_is_one_graph() -> None:
    model = tiny_vit(depth=1)
    info, head = describe(model), head_names(model)
    info = {name: what for name, what in info.items() if name not in head}
    fc1, qkv, proj = (f"blocks.0.{n}.weight" for n in ("mlp.fc1", "attn.qkv", "attn.proj"))
    specs = {
        fc1: LoraSpec(2, ((0, 96),), 24, 1.0, 0.0),
        qkv: LoraSpec(2, ((0, 24), (48, 72)), 24, 1.0, 0.0),
        proj: AdapterSpec(2, ((0, 24),)),
    }
    positions = {
        name: torch.arange(what.numel // 3, 2 * what.numel // 3, 5)
        for name, what in info.items()
        if name not in (fc1, proj)
    }
    apply(model, Plan(positions, specs, info, head=head)).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_b", "up_weight", "delta")):
            nn.init.normal_(parameter, std=0.02)
    images, _ = tiny_batch()
    expected = gradients(model, model, images)
    assert len(expected) > 20
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = gradients(model, compiled, images)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)

    # an optimizer step reaches the weights although a compiled forward does not look
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    for delta in sparse_deltas(model).values():
        held = delta.target.view(-1)[delta.index.long()]
        assert torch.equal(held, delta.original + delta.delta)
    assert torch.allclose(compiled(images), model(images), atol=1e-5)


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseDeltaConv2d(nn.Conv2d(3, 8, 4, 4), torch.arange(0, 384, 7), torch.tensor([1])),
        nn.GELU(),
        SparseDeltaConv2d(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.arange(0, 72, 5)),
    )
    x = torch.randn(2, 3, 16, 16)
    expected = gradients(model, model, x)
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    assert len(expected) == 3
    assert F.gelu(x).shape == x.shape


def test_what_is_trained_besides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseDeltaConv2d(nn.Conv2d(3, 8, 4, 4), torch.arange(0, 384, 7)),
        nn.Flatten(2),
        SparseDeltaLinear(nn.Linear(16, 6), torch.arange(0, 96, 5)),
        LoraLinear(nn.Linear(6, 6), LoraSpec(2, ((1, 4),), 6, 1.0, 0.0)),
    )
    for name in ("0.bias", "2.bias", "3.weight", "3.bias"):
        model.get_parameter(name).requires_grad_(True)
    x = torch.randn(2, 3, 16, 16)
    expected = gradients(model, model, x)
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert len(expected) == 8
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_delta_dense_enough_for_blocks_of_the_dense_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseDeltaLinear(nn.Linear(24, 16), torch.arange(0, 384, 2)), nn.GELU())
    assert model[0].__dict__["_spt_pattern"].whole._plan
    x = torch.randn(3, 5, 24)
    expected = gradients(model, model, x)
    actual = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert set(expected) == {"0.delta"}
    torch.testing.assert_close(actual["0.delta"], expected["0.delta"])


KINDS = {"lora": "lora", "adapter": "adapter", "unstructured": None}
# model, side of its images, budget
MODELS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "vit": (functools.partial(tiny_vit, depth=1), 16, 700),
    "swin": (functools.partial(tiny_swin, depths=(2, 1)), 32, 1500),
    "convnext": (tiny_convnext, 32, 900),
}
MARKS = {"swin": pytest.mark.slow}


# what each architecture brings of its own is the same whatever is put on it
CASES = [("vit", kind) for kind in KINDS] + [("swin", "unstructured"), ("convnext", "adapter")]


@pytest.mark.parametrize(
    ("make", "size", "budget", "kind"),
    [
        pytest.param(*MODELS[name], KINDS[kind], id=f"{name}-{kind}", marks=MARKS.get(name, ()))
        for name, kind in CASES
    ],
)
def test_one_graph_serves_another_task(
    make: Callable[..., nn.Module], size: int, budget: int, kind: str | None, tmp_path: Path
) -> None:
    plan = spt.allocate(skewed_sensitivity(make()), budget, kind, rank=2, dropout=0.0)
    for task in ("first", "second"):
        other = apply(make(), plan)
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        spt.save_delta(other, tmp_path / task)
    model = spt.load_delta(make(), tmp_path / "first").train()
    images, target = tiny_batch(size=size)
    counters.clear()
    # guards are Dynamo's: what becomes of its graph does not matter here
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for task in ("first", "second"):
        spt.load_delta(compiled, tmp_path / task)
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(compiled(images), target).backward()
    assert counters["stats"]["unique_graphs"] == 1
    if size != 16:
        return  # that it goes on without autocast is for the layers to say, on ViTs
    model.zero_grad()
    for run in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert torch.isfinite(run(images)).all()


class Kept:
    """A backend that counts the bytes which a compiled forward keeps for its backward."""

    bytes = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=self._compile)

    def _compile(
        self, graph: torch.fx.GraphModule, _: Any, is_backward: bool = False, **others: Any
    ) -> Any:
        if not is_backward:
            outputs = next(iter(reversed(graph.graph.nodes))).args[0]
            values = [
                node.meta["val"]
                for node in outputs[1:]  # after what the model returns
                if isinstance(node, torch.fx.Node) and node.op != "placeholder"
            ]
            tensors = [value for value in values if isinstance(value, Tensor)]
            storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
            self.bytes = sum(storage.nbytes() for storage in storages.values())
        return make_boxed_func(graph)


def kept_bytes(model: nn.Module, images: Tensor, autocast: bool) -> int:
    torch._dynamo.reset()
    kept = Kept()
    compiled = torch.compile(model.train(), fullgraph=True, backend=kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compiled(images)
    return kept.bytes


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])
def test_what_is_kept_beside_a_compiled_lora(autocast: bool) -> None:
    images, _ = tiny_batch(64)  # so many that weights do not hide activations

    def make() -> nn.Module:  # so deep that what is kept outside of blocks does not hide theirs
        return tiny_vit(depth=2 if autocast else 3, width=48)

    theirs = kept_bytes(peft_lora(make()), images, autocast)
    model = make()
    info, head = describe(model), head_names(model)
    weights = [name for name in info if name.startswith("blocks") and info[name].kind == "linear"]
    entries = {name: torch.arange(0, info[name].numel, 50) for name in weights}
    thirds = ((0, 48), (48, 96), (96, 144))
    qkv, proj = ([n for n in weights if n.endswith(f"{end}.weight")] for end in ("qkv", "proj"))
    kinds: tuple[dict[str, LoraSpec | AdapterSpec], ...] = (
        {},
        {name: LoraSpec(1, thirds, 48, 1.0, 0.1) for name in qkv},
        {name: AdapterSpec(1, ((0, 48),)) for name in proj},
    )
    for structured in kinds if autocast else kinds[:2]:
        rest = {name: index for name, index in entries.items() if name not in structured}
        tuned = apply(make(), Plan(rest, structured, info, head=head))
        assert kept_bytes(tuned, images, autocast) <= 0.95 * theirs


def peft_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["delta", "lora", "conv"])
def test_compiled_autograd_takes_nothing_that_a_layer_reads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_kernels.layers.lora.small_shape", lambda *_: None)  # which keep theirs
    torch.manual_seed(0)
    layer: nn.Module = SparseDeltaLinear(nn.Linear(8, 6), torch.arange(0, 48, 5))
    before: nn.Module = nn.LayerNorm(8)
    x = torch.randn(4, 8, requires_grad=True)
    if kind == "lora":
        layer = LoraLinear(nn.Linear(8, 6), LoraSpec(2, ((0, 6),), 8, dropout=0.0))
    elif kind == "conv":
        layer = SparseDeltaConv2d(nn.Conv2d(8, 6, 1), torch.arange(0, 48, 5))
        before, x = nn.GELU(), torch.randn(2, 8, 3, 3, requires_grad=True)
    model = nn.Sequential(before, layer)
    expected = gradients(model, model, x)
    compiler = torch.compile(backend="eager", fullgraph=True)  # no launch that it cannot trace
    with compiled_autograd._enable(compiler):
        found = gradients(model, model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    loss = model(x).square().sum()
    said = "turn it on before the forward"
    with compiled_autograd._enable(compiler), pytest.raises(RuntimeError, match=said):
        loss.backward()


def test_compiled_autograd_finds_ops_where_a_loras_backward_would_launch_on_a_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(8, 6), LoraSpec(2, ((0, 6),), 8, dropout=0.3))
    model, x, called = nn.Sequential(nn.Linear(8, 8), layer), torch.randn(4, 8), set()

    def compiler(graph: Any) -> Any:
        def listed(traced: Any, _: Any) -> Any:
            called.update(str(node.target) for node in traced.graph.nodes)
            return traced.forward

        return torch.compile(graph, backend=listed, fullgraph=True)

    with as_on_card():
        torch.manual_seed(1)
        expected = gradients(model, model, x)
        torch.manual_seed(1)
        monkeypatch.setattr(lora_launches, "goes_as_on_card", lambda tensor: True)
        with compiled_autograd._enable(compiler):
            found = gradients(model, model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert {f"spt.low_rank_{kind}" for kind in ("down", "grad", "up_")} <= called
