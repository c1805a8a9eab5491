"""Training with weights on the host is training without, to the last bit, and in less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import spt_kernels as spt
from spt_kernels.offloading import blocks_on_host
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit

from .runs import (
    DEPTH,
    assert_same,
    from_block,
    loss_of,
    sparse,
    there,
    torchs,
    train,
    tuned,
    values_of,
)

MADE: dict[str, Callable[[], nn.Module]] = {
    "spt-lora": lambda: tuned("spt-lora"),
    "spt-unstructured": lambda: tuned("spt-unstructured"),
    "lora": lambda: tuned("lora-2"),
    "bias": lambda: tuned("bias"),
    "linear": lambda: tuned("linear"),
    "partial": lambda: tuned("partial-1"),
    "bf16": lambda: tuned("spt-lora", tiny_vit(depth=DEPTH).bfloat16()),
    "fp64": lambda: tuned("spt-unstructured", tiny_vit(depth=DEPTH).double()),
    "late": lambda: from_block(2),
}


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, sparse) for name in MADE), ("spt-unstructured", torchs)]
)
def test_training_is_the_same_to_the_last_bit(name: str, optimizer: Any) -> None:
    expected = train(MADE[name](), optimizer)
    model = MADE[name]()
    assert spt.offload(model).streamed
    assert_same(train(model, optimizer), expected)


@pytest.mark.parametrize("name", ["spt-lora", "lora", "late"])
def test_under_autocast_it_is_the_same_with_half_the_bytes(name: str) -> None:
    expected = train(MADE[name](), autocast=True)
    model = MADE[name]()
    made = spt.offload(model)
    assert_same(train(model, autocast=True), expected)
    fetched = sum(block.fetched_bytes for block in blocks_on_host(model))
    assert 0 < fetched < 0.6 * 3 * 2 * made.host_bytes


@pytest.mark.parametrize(("make", "autocast"), [(tiny_swin, True), (tiny_convnext, False)])
def test_other_families(make: Callable[[], nn.Module], autocast: bool) -> None:
    how = {"autocast": autocast, "size": 32, "steps": 2}
    expected = train(tuned("spt-lora", make()), **how)
    model = tuned("spt-lora", make())
    spt.offload(model)
    assert_same(train(model, **how), expected)


def test_blocks_below_all_that_is_trained_are_fetched_once() -> None:
    model = from_block(2)
    made = spt.offload(model, "forward-only")
    assert tuple(made.streamed) == made.forward_only == ("blocks.0", "blocks.1")
    train(model, steps=2)
    assert sum(block.fetched_bytes for block in blocks_on_host(model)) == 2 * made.host_bytes


def test_a_block_with_a_backward_is_fetched_twice_but_for_the_last() -> None:
    model = tuned("spt-lora")
    made = spt.offload(model)
    train(model, steps=2)
    per_block = [block.fetched_bytes // block.nbytes for block in blocks_on_host(model)]
    # the last one stays from its forward for its backward
    assert per_block == [4] * (DEPTH - 1) + [2]
    assert made.host_bytes == sum(
        -(-p.nbytes // 512) * 512
        for name, p in model.named_parameters()
        if name.startswith("blocks") and p.dim() > 1 and not p.requires_grad
    )


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_more_blocks_are_there_than_are_in_flight(ahead: int) -> None:
    model = tuned("spt-lora", tiny_vit(depth=5))
    spt.offload(model, ahead=ahead)
    in_forward, in_backward = [], []

    def watch(_: Any, inputs: Any, output: torch.Tensor) -> None:
        in_forward.append(len(there(model)))
        output.register_hook(lambda _: in_backward.append(len(there(model))))

    for block in model.blocks:  # type: ignore[union-attr]
        block.mlp.fc1.register_forward_hook(watch)
    train(model, steps=2)
    assert max(in_forward) == max(in_backward) == 1 + ahead
    assert there(model) == []


def test_weights_are_ahead_of_their_block() -> None:
    model = tuned("spt-lora")
    spt.offload(model)
    train(model, steps=1)  # which the order is learnt from
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(there(model)))  # type: ignore[index]
    model.patch_embed.register_forward_hook(lambda *_: seen.append(there(model)))  # type: ignore[union-attr]
    loss_of(model, 0).backward()
    assert seen == [["blocks.0"], ["blocks.1"]]  # before the first block, and after it


def test_bytes_to_keep_keep_the_last_blocks() -> None:
    expected = train(tuned("spt-lora"))
    model = tuned("spt-lora")
    each = next(iter(spt.offload(model).streamed.values()))
    made = spt.offload(model, keep_bytes=each + 1)
    assert list(made.streamed) == ["blocks.0", "blocks.1"]
    assert list(made.kept) == ["blocks.2"]
    assert_same(train(model), expected)
    with pytest.raises(ValueError, match=r"keep_bytes: what can be offloaded of .* all may stay"):
        spt.offload(model, keep_bytes=10 * each)
    assert list(made.streamed) == [block.name for block in blocks_on_host(model)]
    assert list(spt.offload(model).streamed) == ["blocks.0", "blocks.1", "blocks.2"]


def test_all_comes_back() -> None:
    model, other = tuned("spt-lora"), tuned("spt-lora")
    spt.offload(model)
    addresses = {p.untyped_storage()._cdata for p in model.blocks.parameters()}  # type: ignore[union-attr]
    made = spt.offload(model, "nothing")
    assert not made.streamed
    assert not hasattr(model, "spt_offload")
    assert not any(vars(m)["_forward_hooks"] for m in model.modules())
    assert not any(vars(m)["_state_dict_pre_hooks"] for m in model.modules())
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]  # type: ignore[union-attr]
    assert len({p.untyped_storage()._cdata for p in matrices}) == len(matrices)
    assert addresses
    assert_same(train(model), train(other))


def test_weights_for_which_there_is_no_room_stay_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = tuned("spt-unstructured"), tuned("spt-unstructured")
    spt.offload(model)
    blocks = blocks_on_host(model)

    def fail(device: torch.device) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(blocks[1], "values_on", fail)
    with pytest.raises(torch.OutOfMemoryError):
        spt.offload(model, "nothing")
    with pytest.raises(torch.OutOfMemoryError):
        spt.unload(model)
    assert blocks_on_host(model) == blocks
    assert_same(train(model), train(other))


def test_training_goes_on_after_a_change_of_mind() -> None:
    model, other = tuned("spt-unstructured"), tuned("spt-unstructured")
    optimizer, reference = sparse(model), sparse(other)
    for seed, kept in enumerate([0, None, 0, 30_000]):
        if kept is None:
            spt.offload(model, "nothing")
        else:
            spt.offload(model, keep_bytes=kept)
        for each, stepper in ((model, optimizer), (other, reference)):
            torch.manual_seed(seed)
            loss_of(each, seed).backward()
            stepper.step()
            stepper.zero_grad()
    assert_same(([], values_of(model)), ([], values_of(other)))


def test_gradients_accumulate() -> None:
    found = []
    for is_offloaded in (False, True):
        model = tuned("spt-lora", dropout=0.0)
        if is_offloaded:
            spt.offload(model)
        for seed in range(3):
            loss_of(model, seed).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("part", "reentrant", "autocast"),
    [
        *(("block", False, False), ("block", True, True), ("mlp", False, True)),
        *(("mlp", True, False), ("all", False, True), ("all", True, False)),
    ],
)
def test_checkpointing(part: str, reentrant: bool, autocast: bool) -> None:
    def made() -> nn.Module:
        model = tuned("spt-lora")
        parts = {
            "block": list(model.blocks),  # type: ignore[arg-type]
            "mlp": [block.mlp for block in model.blocks],  # type: ignore[union-attr]
            "all": [model.blocks],
        }[part]
        for module in parts:
            inner = module.forward
            module.forward = lambda x, inner=inner, module=module: checkpoint(  # type: ignore[misc]
                inner, x, use_reentrant=reentrant
            )
        return model

    expected = train(made(), steps=2, autocast=autocast)
    model = made()
    spt.offload(model)
    assert_same(train(model, steps=2, autocast=autocast), expected)
    assert there(model) == []


def test_a_graph_is_gone_through_twice() -> None:
    model, other = tuned("spt-lora", dropout=0.0), tuned("spt-lora", dropout=0.0)
    spt.offload(model)
    for each in (model, other):
        loss = loss_of(each, 0)
        loss.backward(retain_graph=True)
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    assert there(model) == []


def test_second_derivatives_are_refused() -> None:
    model = tuned("bias")
    spt.offload(model)
    images, labels = tiny_batch()
    loss = F.cross_entropy(model(images.requires_grad_()), labels)
    with pytest.raises(
        RuntimeError, match=r"blocks\.2 is offloaded and has first derivatives only"
    ):
        torch.autograd.grad(loss, images, create_graph=True)
    loss.backward()


def test_transforms_are_refused() -> None:
    model, (images, labels) = tuned("spt-lora"), tiny_batch()
    expected = model(images)
    spt.offload(model)
    with pytest.raises(RuntimeError, match=r"blocks\.0 is offloaded, where neither transforms"):
        torch.func.grad(lambda x: F.cross_entropy(model(x), labels))(images)
    assert torch.equal(model(images), expected)


def test_a_backward_may_begin_within_a_block() -> None:
    found = []
    for is_offloaded in (False, True):
        model = tuned("spt-lora", dropout=0.0)
        if is_offloaded:
            spt.offload(model)
        taken: dict[str, torch.Tensor] = {}

        def take(_: Any, inputs: Any, output: torch.Tensor, taken: Any = taken) -> None:
            taken["within"] = output

        model.blocks[1].mlp.fc1.register_forward_hook(take)  # type: ignore[index,union-attr]
        loss_of(model, 0)
        trained = [p for p in model.blocks[0].parameters() if p.requires_grad]  # type: ignore[index,union-attr]
        loss = taken["within"].square().sum()
        found.append(torch.autograd.grad(loss, trained, allow_unused=True))
        assert there(model) == []
    for mine, expected in zip(*found, strict=True):
        assert (mine is None and expected is None) or torch.equal(mine, expected)


def test_gradients_of_the_input() -> None:
    found = []
    for is_offloaded in (False, True):
        model = tuned("linear").eval()
        if is_offloaded:
            assert len(spt.offload(model, "forward-only").streamed) == DEPTH
        images = tiny_batch()[0].requires_grad_()
        found.append(torch.autograd.grad(model(images).sum(), images)[0])
    assert torch.equal(*found)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    init_method = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_below_a_wrapper_for_data_parallelism() -> None:
    found = []
    for is_offloaded in (False, True):
        wrapped = nn.parallel.DistributedDataParallel(tuned("spt-unstructured"))
        if is_offloaded:
            spt.offload(wrapped.module)
        optimizer = sparse(wrapped)
        for seed in range(2):
            loss_of(wrapped, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(([], values_of(wrapped.module)))
    assert_same(found[1], found[0])


class Twice(nn.Module):
    """A block that is used twice, another whose weight it shares, and one that is used once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, :8]
        for n in (0, 1, 1, 2, 1, 0):
            x = x + self.blocks[n](x)
        return self.head(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_used_more_than_once_and_shared_weights(autocast: bool) -> None:
    expected = train(tuned("spt-unstructured", Twice(), budget=60), autocast=autocast)
    model = tuned("spt-unstructured", Twice(), budget=60)
    made = spt.offload(model)
    assert set(made.streamed) == {"blocks.0", "blocks.1", "blocks.2"}
    matrix = 8 * 8 * 4
    assert made.streamed["blocks.0"] == made.streamed["blocks.2"] == 512 >= matrix
    assert_same(train(model, autocast=autocast), expected)


def test_inference() -> None:
    images = tiny_batch()[0]
    model, other = tuned("spt-lora").eval(), tuned("spt-lora").eval()
    spt.offload(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(images), other(images))
    assert there(model) == []
    assert_same(train(model.train(), steps=1), train(other.train(), steps=1))


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_nothing_there(error: type[BaseException]) -> None:
    expected = train(tuned("spt-lora"), autocast=True)
    model = tuned("spt-lora")
    spt.offload(model)

    def fail(*_: Any) -> None:
        raise error

    hook = model.blocks[1].mlp.register_forward_hook(fail)  # type: ignore[index,union-attr]
    with pytest.raises(error):
        loss_of(model, 0)
    hook.remove()
    if error is ArithmeticError:
        assert set(there(model)) <= {"blocks.2"}  # ahead
    assert_same(train(model, autocast=True), expected)
    assert there(model) == []


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_backward_that_fails_is_over_with_the_next_forward(ahead: int) -> None:
    expected = train(tuned("spt-lora"))
    model = tuned("spt-lora")
    spt.offload(model, ahead=ahead)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    loss = loss_of(model, 0)
    hook = model.blocks[1].mlp.fc1.register_full_backward_pre_hook(fail)  # type: ignore[index,union-attr]
    for forward in (model, model.forward_features):
        loss = loss_of(model, 0)
        with pytest.raises(ArithmeticError):
            loss.backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            forward(tiny_batch()[0])  # type: ignore[operator]
    hook.remove()
    model.zero_grad()
    assert_same(train(model), expected)
    assert there(model) == []


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    for optimizer in (sparse, torchs):
        model = tuned("spt-unstructured")
        spt.offload(model)
        stepper = optimizer(model)
        for seed in range(3):  # on the general way, and on the prepared one
            loss_of(model, seed).backward()
            early = loss_of(model, seed)
            stepper.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                early.backward()


def test_a_task_is_saved_loaded_merged_and_dropped(tmp_path: Path) -> None:
    model, other = tuned("spt-lora"), tuned("spt-lora")
    spt.offload(model, keep_bytes=1)
    for n, each in enumerate((model, other)):
        train(each, steps=2)
        spt.save_delta(each, tmp_path / str(n))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert len(blocks_on_host(model)) == DEPTH
    train(model, steps=1)
    spt.load_delta(model, tmp_path / "0")
    assert_same(([], values_of(model)), ([], values_of(other)))
    assert model.spt_offload.keep_bytes == 1  # type: ignore[union-attr]

    plain = tiny_vit(depth=DEPTH).requires_grad_(False)
    spt.offload(plain)
    spt.load_delta(plain, tmp_path / "0")
    assert len(blocks_on_host(plain)) == DEPTH
    assert_same(([], values_of(plain)), ([], values_of(other)))
    spt.unload(plain)
    assert len(blocks_on_host(plain)) == DEPTH
    assert_same(([], values_of(plain)), ([], values_of(tiny_vit(depth=DEPTH))))

    spt.merge(model)
    spt.merge(other)
    assert not blocks_on_host(model)  # all of it may be trained again
    assert_same(([], values_of(model)), ([], values_of(other)))


@pytest.mark.parametrize("verb", ["save_delta", "load_delta", "merge", "unload"])
def test_verbs_on_what_is_within_an_offloaded_module(verb: str, tmp_path: Path) -> None:
    found = []
    for offloaded in (False, True):
        model = tuned("spt-lora")
        train(model, steps=2)
        path = tmp_path / str(offloaded)
        spt.save_delta(model, path)
        around = nn.Sequential(model)
        if offloaded:
            spt.offload(around)
        if verb == "save_delta":
            spt.save_delta(model, path)
        elif verb == "load_delta":
            train(model, steps=1)
            spt.load_delta(model, path)
        else:
            getattr(spt, verb)(model)
        assert bool(blocks_on_host(around)) == (offloaded and verb in ("save_delta", "load_delta"))
        spt.offload(around, "nothing")
        found.append((path.read_bytes(), ([], values_of(model))))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1])


def test_what_a_method_has_trained_is_saved_and_folded_in(tmp_path: Path) -> None:
    made = []
    for n in range(2):
        torch.manual_seed(1)
        tunable = spt.methods["lora-2"](tiny_vit(depth=DEPTH))
        if n:
            spt.offload(tunable.model)
        train(tunable.model.train(), torchs, steps=2)
        tunable.save(tmp_path / str(n))
        made.append(([], values_of(tunable.deployed())))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert_same(made[1], made[0])
    assert len(blocks_on_host(tunable.model)) == DEPTH
    assert all(isinstance(m, nn.Linear) for m in owners_of(tunable.model))


def owners_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are streamed, which are those that the model has now."""
    modules = set(model.modules())
    owners = [matrix.owner for block in blocks_on_host(model) for matrix in block.matrices]
    assert modules.issuperset(owners)
    return owners


def test_a_task_that_does_not_fit_leaves_weights_where_they_are(tmp_path: Path) -> None:
    spt.save_delta(tuned("spt-lora", tiny_vit(width=12)), tmp_path / "task")
    model = tuned("spt-lora")
    spt.offload(model)
    with pytest.raises(spt.BaseModelMismatch):
        spt.load_delta(model, tmp_path / "task")
    assert len(blocks_on_host(model)) == DEPTH
    assert_same(train(model), train(tuned("spt-lora")))
