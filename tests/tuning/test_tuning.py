"""`apply` on whole models: gradients against dense autograd, and everything that it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from spt_kernels import (
    AdapterSpec,
    BaseModelMismatch,
    LoraSpec,
    Plan,
    Sensitivity,
    SparseAdamW,
    allocate,
    apply,
    load_delta,
    measure_sensitivity,
    merge,
    param_groups,
    save_delta,
    unload,
)
from spt_kernels.layers import (
    AdapterLinear,
    FrozenLinear,
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
    sparse_deltas,
    tuned_modules,
)
from spt_kernels.model import describe, guess, head_names
from spt_kernels.model.tied import sharing_names
from spt_kernels.task.base_model import BaseModel
from spt_kernels.tuning import replace_module
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (tiny_vit, 16),
    "swin": (tiny_swin, 32),
    "convnext": (tiny_convnext, 32),
}


def unstructured(model: nn.Module, every: int = 7) -> Plan:
    """Some entries of every single parameter but the head's."""
    info, head = describe(model), head_names(model)
    info = {name: what for name, what in info.items() if name not in head}
    positions = {
        name: torch.arange(min(2, w.numel - 1), w.numel, every) for name, w in info.items()
    }
    return Plan(positions, {}, info, head=head)


def state_of(model: nn.Module) -> dict[str, object]:
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        **{f"{name}.requires_grad": p.requires_grad for name, p in model.named_parameters()},
        **{f"{name}.type": type(module) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        same = (
            torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        )
        assert same, name
    assert not hasattr(model, "spt_tuning")


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_real_model_gets_its_dense_gradient(name: str) -> None:
    make, size = MODELS[name]
    plain, model = make(), make()
    plan = unstructured(model)
    assert apply(model, plan) is model
    images, labels = tiny_batch(size=size)
    y, expected = model(images), plain(images)
    assert torch.equal(y, expected)
    F.cross_entropy(y, labels).backward()
    F.cross_entropy(expected, labels).backward()

    dense = {name: p.grad for name, p in plain.named_parameters()}
    deltas = sparse_deltas(model)
    assert deltas.keys() == plan.unstructured.keys()
    for name, delta in deltas.items():
        truth = dense[name].flatten()[plan.unstructured[name]]
        torch.testing.assert_close(delta.delta.grad, truth, rtol=1e-4, atol=1e-6, msg=name)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if n not in plan.head) == plan.num_trainable
    for name in plan.head:
        torch.testing.assert_close(trained[name].grad, dense[name])


@pytest.mark.parametrize("name", MODELS)
def test_training_a_tuned_model_is_training_the_masked_dense_one(name: str) -> None:
    make, size = MODELS[name]
    plain, model = make(), make()
    plan = unstructured(model, every=11)
    apply(model, plan)
    images, labels = tiny_batch(size=size)
    masks = {}
    for name, parameter in plain.named_parameters():
        mask = torch.zeros(parameter.numel())
        mask[plan.unstructured.get(name, torch.arange(parameter.numel()))] = 1.0
        masks[name] = mask.view(parameter.shape)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        for m in (model, plain)
    ]
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(m(images), labels).backward()
            if m is plain:
                for name, parameter in plain.named_parameters():
                    parameter.grad.mul_(masks[name])
            optimizer.step()
    dense = dict(plain.named_parameters())
    for name, delta in sparse_deltas(model).items():
        torch.testing.assert_close(delta.target, dense[name].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-3, atol=1e-4)


def test_what_stands_where() -> None:
    model = tiny_vit()
    info, head = describe(model), head_names(model)
    qkv, fc1, fc2 = (f"blocks.0.{n}.weight" for n in ("attn.qkv", "mlp.fc1", "mlp.fc2"))
    positions = {
        qkv: torch.tensor([24 * 30]),
        "blocks.0.attn.qkv.bias": torch.tensor([1]),
        "blocks.0.attn.proj.bias": torch.tensor([2]),
        "blocks.1.norm1.weight": torch.tensor([3]),
        "patch_embed.proj.weight": torch.tensor([4]),
        "cls_token": torch.tensor([5]),
        "blocks.1.mlp.fc1.weight": torch.empty(0, dtype=torch.int64),
    }
    specs = {
        qkv: LoraSpec(2, ((0, 24),), 24),
        fc1: LoraSpec(2, ((0, 96),), 24),
        fc2: AdapterSpec(2, ((0, 24),)),
    }
    apply(model, Plan(positions, specs, info, head=head))
    block = model.blocks[0]
    assert isinstance(block.attn.qkv, LoraLinear)
    assert type(block.attn.proj) is SparseDeltaLinear
    assert type(block.mlp.fc1) is LoraLinear
    assert type(block.mlp.fc2) is AdapterLinear
    assert isinstance(model.blocks[1].norm1, SparseDeltaNorm)
    assert type(model.blocks[1].mlp.fc2) is FrozenLinear
    assert type(model.head) is nn.Linear
    assert type(model.patch_embed.proj) is SparseDeltaConv2d
    # a sparse Linear has a delta of its weight, be it an empty one
    assert set(sparse_deltas(model)) == positions.keys() | {"blocks.0.attn.proj.weight"}
    assert set(BaseModel.of(model).structured) == specs.keys()
    assert "" in tuned_modules(model)  # cls_token is the model's own
    images, labels = tiny_batch()
    F.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert model.spt_tuning.requires_grad["cls_token"]
    assert model.spt_tuning.base_head.keys() == set(head)


def test_the_head_is_kept_as_it_was_and_trains() -> None:
    model = tiny_vit()
    plan = unstructured(model)
    before = model.head.weight.detach().clone()
    apply(model, plan)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert torch.equal(model.spt_tuning.base_head["head.weight"], before)
    assert model.head.weight.requires_grad


def test_copies_and_pickles_of_a_tuned_model() -> None:
    model = tiny_vit()
    apply(model, unstructured(model))
    images, labels = tiny_batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
        F.cross_entropy(twin(images), labels).backward()
        grads = [d.delta.grad for d in sparse_deltas(twin).values()]
        assert all(g is not None for g in grads)
        assert twin.spt_tuning.plan.num_trainable == model.spt_tuning.plan.num_trainable
    assert all(d.delta.grad is None for d in sparse_deltas(model).values())


def test_bf16_model_and_state_dict() -> None:
    model = tiny_vit().bfloat16()
    apply(model, unstructured(model))
    for delta in sparse_deltas(model).values():
        assert delta.delta.dtype == torch.float32
        assert delta.original.dtype == torch.bfloat16
        nn.init.normal_(delta.delta, std=0.1)
    images, labels = tiny_batch()
    F.cross_entropy(model(images.bfloat16()).float(), labels).backward()
    other = tiny_vit(seed=3).bfloat16()
    apply(other, unstructured(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images.bfloat16()), model(images.bfloat16()))


def test_hooks_of_the_plain_layers_go_on() -> None:
    model, seen = tiny_vit(), []
    handle = model.blocks[0].mlp.fc1.register_forward_hook(
        lambda m, a, y: seen.append(tuple(y.shape))
    )
    apply(model, unstructured(model))
    model(tiny_batch()[0])
    assert seen == [(4, 17, 96)]
    handle.remove()
    model(tiny_batch()[0])
    assert len(seen) == 1


def test_torch_attention_whose_projection_is_never_called_trains_all_the_same() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attn(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model = Attends()
    plain = copy.deepcopy(model)
    plan = unstructured(model, every=5)
    assert "attn.out_proj.weight" in plan.unstructured
    apply(model, plan)
    x = torch.randn(2, 5, 8)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    dense = dict(plain.named_parameters())
    for name, delta in sparse_deltas(model).items():
        truth = dense[name].grad.flatten()[plan.unstructured[name]]
        torch.testing.assert_close(delta.delta.grad, truth, msg=name)


def beit() -> nn.Module:
    torch.manual_seed(0)
    return Beit(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=3)


def eva() -> nn.Module:
    torch.manual_seed(0)
    return Eva(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=3)


def swin_v2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "window_size": 2}
    return SwinTransformerV2(
        **sizes, embed_dim=24, depths=(1,), num_heads=(3,), num_classes=3
    ).eval()


@pytest.mark.parametrize("make", [beit, eva, swin_v2])
def test_a_weight_that_the_model_reads_itself_trains_where_it_is(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    with torch.no_grad():  # timm starts some of them at zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    plain, base = copy.deepcopy(model), copy.deepcopy(model)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
    found = measure_sensitivity(model, [(images, labels)], progress=False)
    plan = allocate(found, budget=0.1, rank=1)
    (qkv,) = (name for name in plan.unstructured if name.endswith("qkv.weight"))
    assert plan.info[qkv].kind == "functional"
    apply(model, plan)
    y, expected = model(images), plain(images)
    assert torch.equal(y, expected)
    F.cross_entropy(y, labels).backward()
    F.cross_entropy(expected, labels).backward()
    dense = {name: p.grad for name, p in plain.named_parameters()}
    for name, delta in sparse_deltas(model).items():
        if delta.delta.numel():
            truth = dense[name].flatten()[delta.index.long()]
            torch.testing.assert_close(delta.delta.grad, truth, rtol=1e-4, atol=1e-6, msg=name)
    start = sparse_deltas(model)[qkv].target.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert not torch.equal(sparse_deltas(model)[qkv].target, start)

    model.eval()
    save_delta(model, tmp_path / "task.spt")
    load_delta(base, tmp_path / "task.spt").eval()
    assert torch.equal(base(images), model(images))
    merged = merge(base)
    assert type(merged.get_submodule(qkv.removesuffix(".weight"))) is nn.Linear
    torch.testing.assert_close(merged(images), model(images))  # a LoRA rounds once
    unload(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


class Both(nn.Module):
    """Calls one layer and reads its weight as well; of another it only asks the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 8)
        self.called = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.called.weight.dtype)
        y = self.both(x) + F.linear(x, self.both.weight.t())
        with torch.no_grad():
            size = self.called.weight.norm()
        return self.head(self.called(y) / size)


@pytest.mark.parametrize("budget", [20, 60])
def test_a_weight_that_is_read_besides_the_calls_gets_the_gradient_of_both(budget: int) -> None:
    torch.manual_seed(0)
    model = Both()
    plain = copy.deepcopy(model)
    x, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 1, 0])
    found = measure_sensitivity(model, [(x, labels)], progress=False)
    assert found.info["both.weight"].kind == "functional"
    assert found.info["called.weight"].kind == "linear"
    plan = allocate(found, budget, structured=None)
    apply(model, plan)
    y, expected = model(x), plain(x)
    assert torch.equal(y, expected)
    F.cross_entropy(y, labels).backward()
    F.cross_entropy(expected, labels).backward()
    truth = plain.both.weight.grad.flatten()[plan.unstructured["both.weight"]]
    assert len(truth)
    torch.testing.assert_close(sparse_deltas(model)["both.weight"].delta.grad, truth)


def test_a_weight_that_was_not_seen_to_be_read_is_noticed_at_the_second_step() -> None:
    model = beit()
    apply(model, unstructured(model))  # kinds by module type
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images = torch.randn(2, 3, 16, 16)
    model(images).square().sum().backward()
    optimizer.step()
    model(images).square().sum().backward()
    message = r"(?s)blocks\.0\.attn\.qkv is tuned, but the model never.*to 'functional'"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_apply_twice() -> None:
    model = tiny_vit()
    plan = unstructured(model)
    apply(model, plan)
    with pytest.raises(ValueError, match="cannot apply twice"):
        apply(model, plan)
    with pytest.raises(ValueError, match="cannot apply twice"):
        apply(nn.Sequential(SparseDeltaLinear(nn.Linear(2, 2), torch.tensor([0]))), plan)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_vit(width=48), r"cls_token: expected shape \[1, 1, 24\], got \[1, 1, 48\]"),
        (lambda: tiny_vit(depth=1), r"has no parameter blocks\.1\.norm1\.weight"),
        (tiny_swin, "has no parameter cls_token"),
    ],
    ids=["width", "depth", "family"],
)
def test_a_plan_for_another_model(other: Callable[[], nn.Module], message: str) -> None:
    plan = unstructured(tiny_vit())
    model = other()
    before = state_of(model)
    with pytest.raises(BaseModelMismatch, match=message):
        apply(model, plan)
    assert_untouched(model, before)


def test_a_head_that_is_not_there() -> None:
    plan = unstructured(tiny_vit())
    model = tiny_vit(num_classes=0)
    with pytest.raises(BaseModelMismatch, match=r"head\.weight, of the plan's head"):
        apply(model, plan)


def _with_a_shared_weight() -> nn.Module:
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    return model


def _with_two_weights_in_one_memory() -> nn.Module:
    """As tied weights are after a checkpoint that holds them twice was assigned."""
    state = _with_a_shared_weight().state_dict()
    model = tiny_vit()
    model.load_state_dict(state, assign=True)
    return model


def _with_a_head_in_the_memory_of_tokens() -> nn.Module:
    model = tiny_vit()
    model.head.weight.data = model.pos_embed.data[0, :5]
    return model


def _with_a_weight_in_the_memory_of_another() -> nn.Module:
    model = tiny_vit()
    model.blocks[1].attn.qkv.weight.data = model.blocks[0].mlp.fc1.weight.data[5:77]
    return model


def _with_a_transposed_weight() -> nn.Module:
    model = tiny_vit()
    fc1 = model.blocks[0].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().t().contiguous().t())
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with_a_shared_weight, r"fc1\.weight is shared with blocks\.1\.mlp\.fc1\.weight"),
        (
            _with_two_weights_in_one_memory,
            r"blocks\.0\.mlp\.fc1\.weight is shared with blocks\.1.*lie in one memory",
        ),
        (
            _with_a_head_in_the_memory_of_tokens,
            r"head\.weight is shared with pos_embed: two parameters lie in one memory",
        ),
        (
            _with_a_weight_in_the_memory_of_another,
            r"fc1\.weight is shared with blocks\.1\.attn\.qkv\.weight: two parameters lie",
        ),
        (_with_a_transposed_weight, r"blocks\.0\.mlp\.fc1\.weight must be contiguous"),
    ],
    ids=["shared", "one-memory", "head", "part", "strided"],
)
def test_weights_that_cannot_be_tuned(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        apply(model, unstructured(model))
    assert_untouched(model, before)


def test_parameters_beside_each_other_in_one_memory_are_tuned() -> None:
    """Columns of one matrix, whose elements lie between each other, and parts of a flat buffer."""
    model = tiny_vit()
    first, second = (block.attn.proj.weight for block in model.blocks)
    both = torch.cat([first.data, second.data], 1)
    first.data, second.data = both[:, :24], both[:, 24:]
    flat = torch.cat([model.head.weight.data.flatten(), model.head.bias.data])
    model.head.weight.data, model.head.bias.data = flat[:-5].view(5, 24), flat[-5:]
    assert sharing_names(model.named_parameters()) == {}
    scores = {"blocks.0.mlp.fc1.weight": torch.rand(96, 24)}
    apply(model, allocate(Sensitivity.from_tensors(scores, 1), 5, None))


def test_a_head_told_as_a_layer_or_a_pattern_is_looked_up_in_the_model() -> None:
    names = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    scores = {"blocks.0.mlp.fc1.weight": torch.rand(96, 24)}
    for head in (["head", "norm"], "h*", ("norm.*", "head.weight", "head.bias")):
        model = tiny_vit()
        plan = allocate(Sensitivity.from_tensors(scores, 1, head=head), 5, None)
        apply(model, plan)
        found = model.spt_tuning.plan.head
        assert found == (names if head != "h*" else names[2:])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {*found, "blocks.0.mlp.fc1.delta"}
    missing = allocate(Sensitivity.from_tensors(scores, 1, head="score"), 5, None)
    with pytest.raises(BaseModelMismatch, match="has no parameter score, of the plan's head"):
        apply(tiny_vit(), missing)


@pytest.mark.parametrize("head", [None, (), "none"])
def test_only_a_head_that_nobody_decided_on_goes_by_its_name(head: object) -> None:
    model = tiny_vit()
    scores = {"blocks.0.mlp.fc1.weight": torch.rand(96, 24)}
    apply(model, allocate(Sensitivity.from_tensors(scores, 1, head=head), 5, None))
    assert model.head.weight.requires_grad == (head is None)
    assert model.spt_tuning.plan.head_source == ("names" if head is None else "given")


def test_positions_in_the_head() -> None:
    model = tiny_vit()
    plan = Plan({"head.weight": torch.tensor([0])}, {}, describe(model), head=("head.weight",))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"head\.weight is part of the head"):
        apply(model, plan)
    assert_untouched(model, before)


@pytest.mark.parametrize("include", ["head.*", "*"])
@pytest.mark.parametrize("rank", [None, 1], ids=["sparse", "lora"])
def test_a_head_that_is_tuned_like_any_other_part(
    include: str, rank: int | None, tmp_path: Path
) -> None:
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = copy.deepcopy(model)
    images, labels = tiny_batch()
    found = measure_sensitivity(model, [(images, labels)], include=[include], progress=False)
    structured = {"structured": None} if rank is None else {"rank": rank}
    plan = allocate(found, budget=1000, **structured)
    apply(model, plan)
    assert not model.spt_tuning.base_head
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == plan.num_trainable

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert not torch.equal(model(images), base(images))
    save_delta(model, tmp_path / "task.spt")
    load_delta(base, tmp_path / "task.spt")
    assert torch.equal(base(images), model(images))
    load_delta(base, tmp_path / "task.spt")  # once more, onto a model that is tuned
    assert torch.equal(base(images), model(images))
    torch.testing.assert_close(merge(base)(images), model(images))
    unload(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lora_on_a_layer_with_a_forward_of_its_own() -> None:
    class Doubles(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Doubles(4, 3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    info = describe(model)
    assert info["0.weight"].kind == "functional"
    before = state_of(model)
    guessed = {name: guess(name, what.shape) for name, what in info.items()}
    with pytest.raises(ValueError, match=r"0\.weight cannot take a LoRA .* got a Doubles"):
        apply(model, Plan({}, {"0.weight": LoraSpec(1, ((0, 3),), 4)}, guessed))
    assert_untouched(model, before)

    # a sparse delta does not care what the forward makes of the weight
    index = torch.tensor([1, 5, 11])
    apply(model, Plan({"0.weight": index}, {}, info))
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    truth = plain[0].weight.grad.flatten()[index]
    torch.testing.assert_close(sparse_deltas(model)["0.weight"].delta.grad, truth)


class Encodes(nn.Module):
    """In eval mode one fused call has all parameters of torch's layer, where none needs a grad."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize("name", ["norm1.weight", "norm2.bias", "linear1.bias", "linear2.weight"])
def test_entries_of_an_encoder_layer_of_torch_train_in_eval_mode(name: str) -> None:
    torch.manual_seed(0)
    model = Encodes().eval()
    plain, name = copy.deepcopy(model), f"layer.{name}"
    index = torch.tensor([1, 4])
    apply(model, Plan({name: index}, {}, {name: guess(name, model.get_parameter(name).shape)}))
    x = torch.randn(3, 5, 8)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    truth = plain.get_parameter(name).grad.flatten()[index]
    torch.testing.assert_close(sparse_deltas(model)[name].delta.grad, truth)


def test_a_lora_on_the_mlp_of_an_encoder_layer_of_torch() -> None:
    model = Encodes()
    before = state_of(model)
    scores = {"layer.linear1.weight": torch.rand(16, 8)}
    guessed = Sensitivity.from_tensors(scores, num_samples=1, head="head")
    plan = allocate(guessed, 24, structured="lora", rank=1)
    assert plan.structured
    with pytest.raises(ValueError, match=r"layer\.linear1\.weight cannot take .* in eval mode"):
        apply(model, plan)
    assert_untouched(model, before)
    told = Sensitivity.from_tensors(scores, num_samples=1, info=describe(model), head="head")
    plan = allocate(told, 24, structured="lora", rank=1)
    assert not plan.structured
    apply(model, plan)


def test_a_model_that_is_a_single_layer() -> None:
    model = nn.Linear(4, 3)
    plain = copy.deepcopy(model)
    apply(model, Plan({"weight": torch.tensor([1])}, {}, describe(model)))
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(model.delta.grad, plain.weight.grad.flatten()[1:2])
    assert type(unload(model)) is nn.Linear


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"plan must be a Plan, got dict"):
        apply(tiny_vit(), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        apply(3, unstructured(tiny_vit()))  # type: ignore[arg-type]


def test_a_wrapped_model() -> None:
    model = tiny_vit()
    plan = unstructured(model)
    before = state_of(model)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(
            ValueError, match=r"model is wrapped in a (OptimizedModule|DataParallel)"
        ):
            apply(wrapped, plan)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.inference_mode()(tiny_vit), "made under torch.inference_mode"),
        (lambda: tiny_vit().to("meta"), "on the meta device"),
        (
            lambda: torch.jit.trace(tiny_vit().eval(), torch.zeros(1, 3, 16, 16)),
            "model is wrapped in a TopLevelTracedModule",
        ),
    ],
    ids=["inference", "meta", "scripted"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:Converting a tensor")
def test_a_model_that_cannot_be_trained(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply(make(), unstructured(tiny_vit()))


def test_the_inference_mode_of_the_caller_does_not_matter() -> None:
    model = tiny_vit()
    with torch.inference_mode():
        apply(model, unstructured(model))
    images, labels = tiny_batch(2)
    F.cross_entropy(model(images), labels).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(float(p.grad.norm()) > 0 for p in trained if p.grad is not None)


def test_replace_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.GELU()))
    new = nn.ReLU()
    replace_module(model, "1.0", new)
    assert model[1][0] is new
    with pytest.raises(AttributeError):
        replace_module(model, "2", new)
    with pytest.raises(ValueError, match="cannot be replaced within itself"):
        replace_module(model, "", new)


def test_a_model_in_channels_last(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return tiny_convnext().to(memory_format=torch.channels_last)

    model, row_major = make(), tiny_convnext()
    images, labels = tiny_batch(size=32)
    found = [measure_sensitivity(m, [(images, labels)], progress=False) for m in (model, row_major)]
    plan, other_plan = (allocate(f, budget=0.05, structured=None) for f in found)
    last = [n for n, p in model.named_parameters() if not p.is_contiguous()]
    tuned = [name for name in last if name in plan.unstructured]
    assert tuned
    for name in tuned:  # the positions are of the logical weight
        shared = set(plan.unstructured[name].tolist()) & set(other_plan.unstructured[name].tolist())
        assert len(shared) > 0.9 * len(plan.unstructured[name])
    optimizers = []
    for m in (model, row_major):
        apply(m, plan)
        optimizers.append(SparseAdamW(param_groups(m), lr=1e-2))
    for _ in range(2):
        for m, optimizer in zip((model, row_major), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(m(images), labels).backward()
            optimizer.step()
    for name, delta in sparse_deltas(model).items():
        other = sparse_deltas(row_major)[name]
        torch.testing.assert_close(delta.target, other.target, rtol=1e-3, atol=2e-3, msg=name)
    save_delta(model, tmp_path / "task.spt")
    loaded = load_delta(make(), tmp_path / "task.spt")
    assert torch.equal(loaded(images), model(images))
    load_delta(tiny_convnext(), tmp_path / "task.spt")  # a base is the same in either format
    expected, plain = make().state_dict(), unload(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.stride() == expected[name].stride(), name
    assert [n for n, p in merge(loaded).named_parameters() if not p.is_contiguous()] == last


def test_no_parameter_and_no_entry_of_a_state_dict_is_empty() -> None:
    model = tiny_vit()
    info, head = describe(model), head_names(model)
    fc1, fc2, proj = (f"blocks.0.{n}" for n in ("mlp.fc1", "mlp.fc2", "attn.proj"))
    nothing = torch.empty(0, dtype=torch.int64)
    positions = {
        f"{fc1}.bias": torch.tensor([1]),  # a bias alone
        f"{fc2}.weight": nothing,
        f"{proj}.bias": torch.tensor([2]),
        "blocks.0.norm1.weight": nothing,
        "cls_token": nothing,
    }
    specs = {f"{proj}.weight": LoraSpec(1, ((0, 24),), 24)}
    plan = Plan(positions, specs, info, head=head)
    apply(model, plan)
    assert all(value.numel() for value in model.state_dict().values())
    assert all(p.numel() for p in model.parameters())
    assert set(sparse_deltas(model)) >= positions.keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)).bfloat16().float()):
        assert set(sparse_deltas(twin)) == set(sparse_deltas(model))
        twin.load_state_dict(model.state_dict())
    # as state dicts were once
    old = dict(model.state_dict())
    for name, dtype in (("delta", torch.float32), ("index", torch.int32), ("original", None)):
        old[f"{fc2}.{name}"] = torch.empty(0, dtype=dtype)
        old[f"cls_token_{name}"] = torch.empty(0, dtype=dtype)
    model.load_state_dict(old)
    old[f"{fc2}.index"] = torch.tensor([3])
    with pytest.raises(RuntimeError, match=r"fc2\.index must be \[0\], got \[1\]"):
        model.load_state_dict(old)
    images, labels = tiny_batch(2)
    F.cross_entropy(model(images), labels).backward()
    before = state_of(tiny_vit())
    assert_untouched(unload(model), before)


def test_a_state_of_accelerate_is_saved_and_loaded(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_vit()
    images, labels = tiny_batch(2)
    found = measure_sensitivity(model, [(images, labels)], progress=False)
    apply(model, allocate(found, budget=0.05, rank=1))
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, SparseAdamW(param_groups(model), lr=1e-2))
    accelerator.backward(F.cross_entropy(model(images), labels))
    optimizer.step()
    expected = model(images)
    accelerator.save_state(str(tmp_path))
    optimizer.step()
    assert not torch.equal(model(images), expected)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(model(images), expected)


def test_a_state_dict_is_assigned_to_a_tuned_model_without_values(tmp_path: Path) -> None:
    model = tiny_vit()
    index = {"blocks.0.mlp.fc1.bias": torch.arange(5), "blocks.1.norm1.weight": torch.arange(3)}
    plan = Plan(index, {}, describe(model), head=("head.weight", "head.bias"))
    apply(model, plan)
    images, labels = tiny_batch()
    nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    twin = copy.deepcopy(model).to("meta")
    twin.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(twin(images), model(images))
    save_delta(twin, tmp_path / "task.safetensors")
    loaded = load_delta(tiny_vit(), tmp_path / "task.safetensors")
    assert torch.equal(loaded(images), model(images))
