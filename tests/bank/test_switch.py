"""A task in use is the task loaded by itself; the base comes back bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.model import describe
from spt_kernels.plan import AdapterSpec, LoraSpec, Plan

from ..task.test_delta import KINDS, assert_same_picture, make_plan, picture
from .tasks import images, loaded, plain, saved


@pytest.mark.parametrize(
    ("name", "kind"),
    [*[("vit", kind) for kind in KINDS], ("swin", "lora"), ("convnext", "adapter")],
    ids=lambda value: value,
)
@torch.no_grad()
def test_in_use_it_is_as_loaded_by_itself(name: str, kind: str, tmp_path: Path) -> None:
    model, x = plain(name), images(name, 3)
    before, of_base = picture(model), model(x)
    paths = {
        "a": saved(tmp_path, name, kind, 0),
        "other positions": saved(tmp_path, name, kind, 1),
        "other head": saved(tmp_path, name, "unstructured", 2, num_classes=7),
    }
    alone = {task: loaded(name, path)(x) for task, path in paths.items()}
    bank = spt.TaskBank(model)
    for task, path in paths.items():
        bank.load(task, path)
    for task in ("a", "other positions", "a", "other head", "other positions"):
        assert bank.use(task) is model
        torch.testing.assert_close(model(x), alone[task], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(x)[:, :5], of_base)
    bank.use(None)
    assert_same_picture(model, before)
    assert torch.equal(model(x), of_base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_weights_of_16_bits_hold_what_a_tuned_model_holds(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = plain("vit").to(dtype)
    tuned = spt.apply(copy.deepcopy(model), make_plan(model, "unstructured"))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    spt.save_delta(tuned, tmp_path / "t")
    before = {n: p.clone() for n, p in model.named_parameters()}
    bank = spt.TaskBank(model)
    bank.load("t", tmp_path / "t")
    bank.use("t")
    expected = dict(spt.merge(tuned).named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    bank.use(None)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_the_model_says_of_its_classes_follows(tmp_path: Path) -> None:
    model = plain("vit")
    bank = spt.TaskBank(model)
    bank.load("seven", saved(tmp_path, "vit", "lora", 0, num_classes=7))
    head = model.head
    bank.use("seven")
    assert (model.num_classes, model.head.out_features) == (7, 7)
    bank.use(None)
    assert (model.num_classes, model.head) == (5, head)


class Said:
    """As a configuration of transformers."""

    def __init__(self) -> None:
        self.id2label = {n: f"base {n}" for n in range(5)}
        self.label2id = {name: n for n, name in self.id2label.items()}
        self.num_labels = 5


def test_the_names_of_classes_come_with_a_model_as_with_its_file(tmp_path: Path) -> None:
    model = plain("vit")
    model.config = Said()
    tuned = loaded("vit", saved(tmp_path, "vit", "lora", 0))
    names = [f"flower {n}" for n in range(5)]
    spt.save_delta(tuned, tmp_path / "t", metadata={"classes": names})
    bank = spt.TaskBank(model)
    bank.load("file", tmp_path / "t")
    bank.add("model", spt.load_delta(plain("vit"), tmp_path / "t"))
    for task in bank:
        assert bank.metadata(task)["classes"] == names
        assert list(bank.use(task).config.id2label.values()) == names  # type: ignore[union-attr]
    bank.use(None)
    assert model.config.id2label[0] == "base 0"


def test_a_head_brought_along_to_a_model_without_one(tmp_path: Path) -> None:
    path = saved(tmp_path, "vit", "unstructured", 1, num_classes=7)
    model, x = plain("vit"), images("vit", 2)
    model.reset_classifier(0)
    bank = spt.TaskBank(model)
    bank.load("seven", path)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = bank.use("seven")(x)
        torch.testing.assert_close(found, loaded("vit", path)(x), rtol=1e-5, atol=1e-5)
    bank.use(None)
    assert isinstance(model.head, nn.Identity)
    assert torch.equal(torch.get_rng_state(), state)


def test_running_statistics_come_and_go(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    tuned = copy.deepcopy(model)
    scores = {n: torch.rand_like(p) for n, p in model.named_parameters() if n[0] == "0"}
    sensitivity = spt.Sensitivity.from_tensors(scores, num_samples=1)
    spt.apply(tuned, spt.allocate(sensitivity, 5, None))
    x = torch.randn(8, 4)
    tuned.train()(x)
    tuned.eval()
    bank = spt.TaskBank(model.eval())
    bank.add("t", tuned)
    of_base = model(x)
    torch.testing.assert_close(bank.use("t")(x), tuned(x))
    assert not torch.allclose(of_base, tuned(x))
    bank.use(None)
    assert torch.equal(model(x), of_base)
    # a forward of the base in training mode is noticed, as any change of its weights
    stray = copy.deepcopy(model)
    of_stray = spt.TaskBank(stray)
    of_stray.add("t", tuned)
    stray.train()(x)
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked was changed"):
        of_stray.use("t")
    # one value for the whole batch: each task runs alone
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked is a buffer"):
        bank.run(x[:2], ["t", None], together=True)
    expected = torch.cat([tuned(x[:1]), of_base[1:2]])
    torch.testing.assert_close(bank.run(x[:2], ["t", None]), expected)


def test_gradients_flow_through_a_task_in_use(tmp_path: Path) -> None:
    bank = spt.TaskBank(plain("vit"))
    path = saved(tmp_path, "vit", "lora", 0)
    bank.load("t", path)
    x, own = (images("vit", 2).requires_grad_() for _ in range(2))
    bank.use("t")(x).square().sum().backward()
    loaded("vit", path)(own).square().sum().backward()
    torch.testing.assert_close(x.grad, own.grad, rtol=1e-4, atol=1e-5)


def test_shared_positions_are_held_once(tmp_path: Path) -> None:
    bank = spt.TaskBank(plain("vit"))
    bank.load("a", saved(tmp_path, "vit", "unstructured", 0))
    alone = bank.nbytes()
    bank.load("b", saved(tmp_path, "vit", "unstructured", 0))
    added = bank.nbytes() - alone
    entries = 4 * make_plan(plain("vit"), "unstructured").num_unstructured
    head = 4 * (24 * 5 + 5)
    assert added == entries + head
    assert bank.nbytes("a") == bank.nbytes("b") == 3 * entries + head


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in-place"])
@torch.no_grad()
def test_compiled_code_notices_tasks_that_come_and_go(in_place: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).eval()
    info = describe(model)
    specs = {"lora": LoraSpec(1, ((0, 6),), 4, dropout=0.0), "adapter": AdapterSpec(1, ((0, 6),))}
    plans = {
        kind: Plan({}, {"0.weight": spec}, info, head=("2.weight", "2.bias"))
        for kind, spec in specs.items()
    }
    plans["sparse"] = Plan({"0.weight": torch.tensor([1, 5])}, {}, info)
    tuned: dict[str | None, nn.Module] = {None: copy.deepcopy(model)}
    bank = spt.TaskBank(model)
    for name in (*plans, "lora again"):
        own = spt.apply(copy.deepcopy(model), plans[name.split()[0]])
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        bank.add(name, own)
        tuned[name] = own
    x = torch.randn(2, 4)
    run = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    for name in (None, "lora", "adapter", "lora again", "sparse", None, "lora"):
        bank.use(name)
        torch.testing.assert_close(run(x), tuned[name](x))
        assert type(model[0]).__name__ == "Linear"
    # no hook would be noticed in a model that is compiled in place
    found, names = bank.run(x, ["lora", None]), ("lora", None)
    torch.testing.assert_close(
        found, torch.cat([tuned[n](x)[i : i + 1] for i, n in enumerate(names)])
    )
    if in_place:
        with pytest.raises(ValueError, match="the model is compiled in place"):
            bank.run(x, ["lora", None], together=True)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_card(tmp_path: Path) -> None:
    paths = {kind: saved(tmp_path, "vit", kind, n) for n, kind in enumerate(KINDS)}
    bank = spt.TaskBank(plain("vit").cuda())
    for kind, path in paths.items():
        bank.load(kind, path)
    x = images("vit", 4)
    alone = {kind: loaded("vit", path)(x) for kind, path in paths.items()}
    for kind, expected in alone.items():
        found = bank.use(kind)(x.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    mixed = bank.run(x.cuda(), [*KINDS, KINDS[0]], together=True)
    assert isinstance(mixed, torch.Tensor)
    for i, kind in enumerate((*KINDS, KINDS[0])):
        torch.testing.assert_close(mixed[i].cpu(), alone[kind][i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "adapter", "unstructured"])
def test_a_model_with_a_task_in_use_is_copied_and_pickled(kind: str, tmp_path: Path) -> None:
    bank = spt.TaskBank(plain("vit"))
    bank.load("task", saved(tmp_path, "vit", kind))
    x = images("vit", 3)
    with torch.inference_mode():
        model = bank.use("task")
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
        bank.use(None)
        assert torch.equal(twin(x), expected)


def test_a_switch_that_fails_half_way_leaves_the_base_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, x = spt.TaskBank(plain("vit")), images("vit", 3)
    for kind in ("lora", "adapter"):
        bank.load(kind, saved(tmp_path, "vit", kind))
    with torch.inference_mode():
        of_base = bank.model(x)
        expected = bank.use("lora")(x)

        def out_of_memory(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("there is none")

        with monkeypatch.context() as patch:
            patch.setattr("spt_kernels.bank.switch.put_on", out_of_memory)
            with pytest.raises(torch.cuda.OutOfMemoryError):
                bank.use("adapter")
        assert bank.in_use is None
        assert torch.equal(bank.model(x), of_base)
        bank.remove("adapter")
        assert torch.equal(bank.use("lora")(x), expected)


def test_a_task_that_cannot_be_taken_off_is_by_the_next_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = plain("vit"), images("vit", 3)
    before, bank = picture(model), spt.TaskBank(model)
    bank.load("lora", saved(tmp_path, "vit", "lora", num_classes=7))
    bank.load("adapter", saved(tmp_path, "vit", "adapter"))

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("there is none")

    def fails(switch: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("spt_kernels.bank.switch.write_entries", out_of_memory)
            with pytest.raises(torch.cuda.OutOfMemoryError):
                switch()
        assert bank.in_use is None

    with torch.no_grad():
        expected = bank.use("lora")(x)
        fails(lambda: bank.use("adapter"))
        assert torch.equal(bank.use("lora")(x), expected)
        fails(lambda: bank.run(x, ["adapter"] * 3))
        # what is read meanwhile finds the base's values beneath what is left of the task
        bank.load("unstructured", saved(tmp_path, "vit", "unstructured", seed=3))
        assert_same_picture(bank.use(None), before)
        bank.use("unstructured")
        assert_same_picture(bank.use(None), before)


def test_a_switch_that_is_interrupted_between_two_tasks_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain("vit")
    before, bank = picture(model), spt.TaskBank(model)
    bank.load("one", saved(tmp_path, "vit", "unstructured"))
    bank.load("two", saved(tmp_path, "vit", "unstructured"))  # of the same positions

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for following in ("two", "one", None):
        bank.use("one")
        with monkeypatch.context() as patch:
            patch.setattr("spt_kernels.bank.switch.Switch._enter", interrupted)
            with pytest.raises(KeyboardInterrupt):
                bank.use("two")
        assert bank.in_use is None
        bank.use(following)
        assert_same_picture(bank.use(None), before)
