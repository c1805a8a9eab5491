"""What happens around a region: graphs kept, used twice or dropped, edits, errors, other hooks."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import spt_kernels as spt
from spt_kernels import recompute
from spt_kernels.memory.made_up import uncalled_of
from spt_kernels.recomputation.call import Entry
from spt_kernels.recomputation.frame import Frame
from spt_kernels.recomputation.packed import Slot
from tests.models import tiny_batch, tiny_vit

from .steps import take_step, tuned

BATCH = tiny_batch(2)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(BATCH[0]), BATCH[1])


def hooks_in_use() -> object:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[object]]]:
    """Storages of all that is made again, while they live; garbage is not collected meanwhile."""
    storages: list[weakref.ref[object]] = []
    fill, leaf = Slot.fill, Entry.leaf

    def watch(slot: Slot, tensor: Tensor) -> None:
        fill(slot, tensor)
        storages.append(weakref.ref(tensor.untyped_storage()))

    def watched_leaf(entry: Entry) -> Tensor:
        tensor = leaf(entry)
        storages.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(Slot, "fill", watch)
    monkeypatch.setattr(Entry, "leaf", watched_leaf)
    gc.disable()
    yield storages
    gc.enable()


def alive(storages: list[weakref.ref[object]]) -> int:
    return sum(ref() is not None for ref in storages)


@pytest.mark.parametrize("what", ["mlp", "qkv", "attention", "block"])
def test_what_is_made_is_gone_once_the_backward_has_passed(what: str, made) -> None:
    model = tiny_vit(depth=3).train()
    recompute(model, what)
    counts = []

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(lambda grad: counts.append((len(made), alive(made))))

    for block in model.blocks:
        block.register_forward_hook(watch)
    loss_of(model).backward()
    total = len(made)
    assert [living for _, living in counts] == [0, 0, 0]
    assert [begun for begun, _ in counts] == [0, total // 3, 2 * total // 3]
    assert alive(made) == 0


def test_a_graph_that_is_dropped_leaves_nothing(made) -> None:
    model = tiny_vit().train()
    recompute(model, ("mlp", "qkv"))
    x = BATCH[0].clone()
    storage = weakref.ref(x.untyped_storage())
    loss = model(x).sum()
    del loss, x
    assert not made
    assert storage() is None


def test_a_graph_gone_through_twice_is_computed_again_once(made) -> None:
    model = tuned(tiny_vit(), "lora")
    plain = take_step(model, BATCH)
    recompute(model, ("mlp", "attention"))
    torch.manual_seed(0)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = len(made)
    model.zero_grad()
    loss.backward()
    assert len(made) == first > 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, plain.grads[name])


def test_gradients_accumulate_over_interleaved_forwards() -> None:
    model = tiny_vit().train()
    images, target = BATCH

    def accumulated() -> list[Tensor]:
        model.zero_grad()
        losses = [F.cross_entropy(model(part), target) for part in (images, images.flip(-1))]
        for loss in reversed(losses):
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = accumulated()
    recompute(model, ("mlp", "qkv"))
    assert all(map(torch.equal, accumulated(), plain))


def test_second_derivatives_are_those_without() -> None:
    model = tiny_vit().train()

    def penalty() -> list[Tensor]:
        images = BATCH[0].clone().requires_grad_(True)
        loss = F.cross_entropy(model(images), BATCH[1])
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        model.zero_grad()
        slope.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
        plain = penalty()
        for what in ("mlp", "attention", "block"):
            recompute(model, what)
            again = penalty()
            assert len(again) == len(plain)
            assert all(map(torch.equal, again, plain)), what


@pytest.mark.parametrize("what", ["block", ("mlp", "qkv")])
def test_tensors_that_were_lent_for_a_call_are_lent_again(what: Any) -> None:
    model = tiny_vit().train()
    lent = {name: (1.3 * p.detach()).requires_grad_() for name, p in model.named_parameters()}

    def gradients() -> tuple[Tensor, ...]:
        scores = torch.func.functional_call(model, lent, BATCH[0])
        return torch.autograd.grad(F.cross_entropy(scores, BATCH[1]), list(lent.values()))

    plain, own = gradients(), dict(model.named_parameters())
    recompute(model, what)
    assert all(map(torch.equal, gradients(), plain))
    assert all(p is own[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_no_hook_behind(error: type[BaseException]) -> None:
    model = tiny_vit().train()
    plain = take_step(model, BATCH)
    recompute(model, ("mlp", "qkv"))

    def fail(*_: object) -> None:
        raise error

    for layer in (model.blocks[0].mlp.fc2, model.blocks[1].attn.qkv):
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(BATCH[0])
        handle.remove()
        if error is ValueError:  # what is no Exception passes hooks of modules by,
            assert hooks_in_use() is None
        assert take_step(model, BATCH).is_same_as(plain)  # and the next forward puts that right
        assert hooks_in_use() is None


@pytest.mark.parametrize("following", ["without it", "another", "inference"])
def test_an_interrupted_forward_is_over_for_all_that_follows(following: str) -> None:
    model = tiny_vit().train()
    plain = take_step(model, BATCH)
    recompute(model, "block")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(BATCH[0])
    handle.remove()
    if following == "inference":
        with torch.no_grad():
            model(BATCH[0])
    else:
        if following == "another":
            model = tiny_vit().train()
        recompute(model, "nothing")
        assert take_step(model, BATCH).is_same_as(plain)
    assert hooks_in_use() is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_that_is_edited_before_the_backward_is_an_error(name: str) -> None:
    model = tiny_vit().train()
    recompute(model, "mlp")
    loss = loss_of(model)
    with torch.no_grad():
        getattr(model.blocks[0].mlp.fc1, name).add_(1.0)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp .* was changed in place since"):
        loss.backward()


def test_an_optimizer_step_before_the_backward_is_an_error() -> None:
    model = tuned(tiny_vit(), None)
    recompute(model, ("mlp", "qkv"))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2)
    first, second = loss_of(model), loss_of(model)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        second.backward()


def test_another_mode_in_the_backward_is_an_error() -> None:
    model = tiny_vit().train()
    recompute(model, "attention")
    loss = loss_of(model)
    model.eval()
    with pytest.raises(RuntimeError, match="switched between training and evaluation"):
        loss.backward()


class Counter(nn.Module):
    """An MLP whose output depends on how often it was called, by one means or another."""

    def __init__(self, means: str) -> None:
        super().__init__()
        self.layer, self.means, self.calls = nn.Linear(24, 24), means, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.means == "buffer":
            self.count += 1
            return self.layer(x).mul(self.count).tanh()
        if self.means == "input":
            return self.layer(x.mul_(2.0)).tanh()
        return self.layer(x).tanh() if self.calls == 1 else self.layer(x[:, 1:]).tanh()


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ("buffer", "Counter changes its buffer count in every forward"),
        ("input", "changes its input in place"),
        ("memory", "saved other tensors when it was computed again"),
    ],
)
def test_what_cannot_be_computed_again_says_so(means: str, message: str) -> None:
    model = tiny_vit().train()
    model.blocks[0].mlp = Counter(means)
    model.blocks[0].norm2 = nn.Identity()  # of a norm's result no one would miss the values
    model.blocks[0].norm2.weight = nn.Parameter(torch.ones(24))
    recompute(model, {"blocks.0": "mlp"})
    with pytest.raises(RuntimeError, match=message):
        loss_of(model).backward()
    assert hooks_in_use() is None


def test_attention_that_is_not_fused_is_refused_for_qkv() -> None:
    model = tiny_vit().train()
    recompute(model, "qkv")
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="not by a fused kernel"):
        loss_of(model)
    assert hooks_in_use() is None


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor, **_: object) -> Tensor:
        output: Tensor = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return output


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_checkpoints_of_torch(reentrant: bool) -> None:
    model = tiny_vit().train()
    plain = take_step(model, BATCH)
    for what in (("mlp", "qkv"), "block"):
        recompute(model, what)
        inside = copy.deepcopy(model)
        for n, block in enumerate(inside.blocks):
            inside.blocks[n] = Wrapped(block, reentrant)
        again = take_step(inside, BATCH)
        assert torch.equal(again.loss, plain.loss)
        assert list(map(torch.equal, again.grads.values(), plain.grads.values())) == [True] * len(
            plain.grads
        )


@pytest.mark.parametrize("offloaded", [False, True], ids=["here", "offloaded"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["lora", "adapter", None])
def test_a_tuned_block_within_a_checkpoint(
    kind: str | None, reentrant: bool, offloaded: bool
) -> None:
    model = tuned(tiny_vit(), kind, dropout=0.2 if kind == "lora" else 0.0)
    for n, block in enumerate(model.blocks):
        model.blocks[n] = Wrapped(block, reentrant)
    plain = take_step(model, BATCH)
    recompute(model, "block")
    if offloaded:
        spt.offload(model)
    assert take_step(model, BATCH).is_same_as(plain)


def test_around_checkpoints_of_torch_and_under_offloading() -> None:
    model = tiny_vit().train()
    plain = take_step(model, BATCH)
    recompute(model, ("mlp", "qkv"))
    with torch.autograd.graph.save_on_cpu():
        assert take_step(model, BATCH).is_same_as(plain)
    recompute(model, "block")
    for block in model.blocks:
        forward = block.mlp.forward
        block.mlp.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    assert take_step(model, BATCH).is_same_as(plain)


def test_a_module_called_twice_in_one_forward() -> None:
    inner = tiny_vit().train()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, images: Tensor) -> Tensor:
            both: Tensor = inner(images) + inner(images.flip(-1))
            return both

    model = Twice()
    plain = take_step(model, BATCH)
    recompute(inner, ("mlp", "qkv"))
    assert take_step(model, BATCH).is_same_as(plain)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("another", [copied, saved_and_loaded])
def test_a_copy_of_the_model_has_it_too(another: Callable[[nn.Module], nn.Module], made) -> None:
    model = tuned(tiny_vit(), "lora")
    names = list(model.state_dict())
    plain = take_step(model, BATCH)
    recompute(model, ("mlp", "qkv"))
    assert list(model.state_dict()) == names
    twin = another(model)
    assert take_step(twin, BATCH).is_same_as(plain)
    assert made
    recompute(twin, "nothing")
    made.clear()
    assert take_step(twin, BATCH).is_same_as(plain)
    assert not made


def test_no_gradient_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    expected = model(BATCH[0])
    recompute(model, ("mlp", "qkv"))
    monkeypatch.setattr(Frame, "__init__", None)
    with torch.no_grad():
        assert torch.equal(model(BATCH[0]), expected)
    with torch.inference_mode():
        assert torch.equal(model(BATCH[0]), expected)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiling_says_what_to_do() -> None:
    # a graph that is broken at the hook goes on without a compiler, between pieces that have one
    torch._dynamo.reset()  # code that was compiled too often is run as it is
    model = nn.Sequential(OrderedDict(blocks=nn.Sequential(tiny_vit(depth=1).blocks[0]))).train()
    recompute(model, "mlp")
    with pytest.raises(RuntimeError, match=r"^blocks\.0\.mlp: torch\.compile decides by itself"):
        torch.compile(model, backend="eager")(torch.randn(1, 2, 24))


def test_tasks_go_on_and_off_with_it(tmp_path) -> None:
    base = tiny_vit()
    model = tuned(copy.deepcopy(base), "lora")
    recompute(model, ("mlp", "qkv"))
    spt.save_delta(model, tmp_path / "task")
    tuned_step = take_step(model, BATCH)
    spt.unload(model)
    assert all(map(torch.equal, model.state_dict().values(), base.state_dict().values()))
    spt.load_delta(model, tmp_path / "task")
    assert take_step(model.train(), BATCH).is_same_as(tuned_step)
    expected = model.eval()(BATCH[0])
    torch.testing.assert_close(spt.merge(model)(BATCH[0]), expected)


def test_sensitivity_is_measured_the_same() -> None:
    model = tiny_vit()
    batch = [tiny_batch(2)]

    def measured() -> tuple[spt.Sensitivity, list[type]]:
        scores = spt.measure_sensitivity(model, batch, loss_fn=F.cross_entropy, num_samples=2)
        twin = spt.apply(copy.deepcopy(model), spt.allocate(scores, 500, None))
        return scores, [type(module) for module in twin.modules()]

    plain, kinds = measured()
    for what in (("mlp", "qkv"), "block"):
        recompute(model, what)
        again, kinds_again = measured()
        assert all(torch.equal(again[name], scores) for name, scores in plain.items()), what
        assert kinds_again == kinds, "what watches a model's calls must not see the frames' own"


@pytest.mark.parametrize("what", ["mlp", "qkv", "attention", "block"])
def test_a_rehearsal_sees_no_other_use_of_weights(what: str) -> None:
    model = tiny_vit()
    recompute(model, what)
    assert not uncalled_of(model, (3, 16, 16))


@pytest.mark.parametrize("trained", ["proj", "fc2", "norm2"])
def test_a_block_of_which_little_is_trained(trained: str) -> None:
    model = tiny_vit().train().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head", "blocks.0")) and trained in name)
    plain = take_step(model, BATCH)
    for what in ("mlp", "qkv", "attention", "block"):
        recompute(model, what)
        assert take_step(model, BATCH).is_same_as(plain), what
