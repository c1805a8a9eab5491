"""A model that was changed between `apply` and the end of its task: told before it is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import spt_kernels as spt
from tests.task.test_delta import (
    KINDS,
    assert_same_picture,
    base,
    make_plan,
    picture,
    predict,
    train,
    tuned,
)

PLANNED = "blocks.0.attn.qkv"


def set_head(model: nn.Module, head: nn.Module) -> None:
    model.head = head


def replace_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    setattr(model.get_submodule(parent), local, module)


def shrink_delta(model: nn.Module) -> None:
    layer = model.blocks[0].norm1
    layer.weight_delta = nn.Parameter(torch.zeros(1))


def re_register(model: nn.Module, name: str, *shape: int) -> None:
    parent, _, local = name.rpartition(".")
    module = model.get_submodule(parent)
    # not by `register_parameter`, in which a tuned layer refuses it
    module._parameters[local] = nn.Parameter(torch.zeros(shape), requires_grad=False)


# what is done to the model -> the message of every verb
BROKEN: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "no-head": (lambda m: m.reset_classifier(0), r"head\.weight of the head is gone"),
    "deep-head": (
        lambda m: set_head(m, nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 5))),
        r"head\.weight of the head is gone",
    ),
    "no-bias": (lambda m: set_head(m, nn.Linear(24, 5, bias=False)), r"head\.bias of the head is"),
    "plain-layer": (
        lambda m: replace_layer(m, PLANNED, nn.Linear(24, 72)),
        r"blocks\.0\.attn\.qkv\.weight is not tuned now",
    ),
    "plain-norm": (
        lambda m: replace_layer(m, "blocks.1.norm2", nn.LayerNorm(24)),
        r"blocks\.1\.norm2\.weight is not tuned now",
    ),
    "no-layer": (
        lambda m: replace_layer(m, PLANNED, nn.Identity()),
        r"blocks\.0\.attn\.qkv\.weight is gone",
    ),
    "fewer-blocks": (lambda m: setattr(m, "blocks", m.blocks[:1]), r"blocks\.1\.\S+ is gone"),
    "frozen-shape": (
        lambda m: re_register(m, "pos_embed", 1, 26, 24),
        r"pos_embed is \[1, 26, 24\] and was \[1, 17, 24\] when the plan",
    ),
    "frozen-gone": (lambda m: setattr(m, "pos_embed", None), "pos_embed is gone"),
    "tuned-shape": (
        lambda m: re_register(m, "blocks.0.norm1.weight", 12),
        r"blocks\.0\.norm1\.weight is \[12\], planned for \[24\]",
    ),
    "delta-shape": (shrink_delta, r"blocks\.0\.norm1\.weight is trained at other positions"),
}
VERBS: dict[str, Callable[[nn.Module, Path], object]] = {
    "unload": lambda model, _: spt.unload(model),
    "merge": lambda model, _: spt.merge(model),
    "save_delta": lambda model, path: spt.save_delta(model, path.with_name("mine")),
    "load_delta": spt.load_delta,
}
NAMES = {"unload": "unload", "merge": "merge", "save_delta": "save", "load_delta": "load a task"}


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task of another plan."""
    path = tmp_path_factory.mktemp("another") / "task.safetensors"
    spt.save_delta(tuned("vit", "adapter", seed=5), path)
    return path


@pytest.mark.parametrize("case", BROKEN)
def test_every_verb_tells_it_and_changes_nothing(case: str, another: Path) -> None:
    model, (change, message) = tuned("vit", "lora"), BROKEN[case]
    change(model)
    before = picture(model)
    for verb, call in VERBS.items():
        with pytest.raises(ValueError, match=rf"^cannot {NAMES[verb]}: {message}"):
            call(model, another)
        assert_same_picture(model, before)
    assert not another.with_name("mine").exists()


TRAINED = [
    *(("unstructured", name) for name in ("weight", "delta", "bias_delta")),
    *(("lora", name) for name in ("lora_a", "lora_b")),
    *(("adapter", name) for name in ("down_weight", "up_bias")),
]
TAKES_OUT = "as weight_norm, spectral_norm and pruning put others in its place"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "pruning"])
@pytest.mark.parametrize(("kind", "name"), TRAINED)
def test_a_tuned_layer_that_was_reparametrised(
    kind: str, name: str, how: str, tmp_path: Path
) -> None:
    model = tuned("vit", kind)
    layer = model.get_submodule(PLANNED)
    if how == "pruning":
        prune.random_unstructured(layer, name, 0.5)
    else:
        nn.utils.weight_norm(layer, name)
    if name == "weight":
        with torch.no_grad():
            layer.delta.add_(1.0)
    with pytest.raises(ValueError, match=rf"{PLANNED}\.{name} is gone, {TAKES_OUT}"):
        predict(model, "vit")
    with pytest.raises(ValueError, match=rf"{name} is gone|{name} on {PLANNED}\.weight is not as"):
        spt.save_delta(model, tmp_path / "task")


@pytest.mark.parametrize(("kind", "name"), TRAINED)
def test_what_is_tuned_takes_no_parametrization(kind: str, name: str) -> None:
    model = tuned("vit", kind)
    layer, before = model.get_submodule(PLANNED), predict(model, "vit")
    message = rf"{PLANNED}\.{name} is tuned and cannot be taken out, {TAKES_OUT}"
    with pytest.raises(ValueError, match=message):
        nn.utils.parametrizations.weight_norm(layer, name)
    assert torch.equal(predict(model, "vit"), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_layer_put_back_is_as_good_as_new(kind: str, another: Path) -> None:
    model = tuned("vit", kind)
    layer, head = model.get_submodule(PLANNED), model.head
    replace_layer(model, PLANNED, nn.Linear(24, 72))
    model.head = nn.Linear(24, 9)
    with pytest.raises(ValueError, match="cannot unload"):
        spt.unload(model)
    replace_layer(model, PLANNED, layer)
    model.head = head
    assert_same_picture(spt.unload(model), picture(base("vit")))


def test_a_head_of_another_size_has_no_base_to_go_back_to(another: Path) -> None:
    model = tuned("vit", "unstructured")
    model.reset_classifier(7)
    before = picture(model)
    for verb in ("unload", "load_delta"):
        message = r"head\.weight is \[7, 24\] and was \[5, 24\] when the plan was applied"
        with pytest.raises(ValueError, match=f"^cannot {NAMES[verb]}.*: {message}"):
            VERBS[verb](model, another)
        assert_same_picture(model, before)


def test_a_head_of_another_size_is_saved_and_merged(tmp_path: Path) -> None:
    """It is the task's own, whenever it came."""
    path, model = tmp_path / "task.safetensors", tuned("vit", "unstructured")
    model.reset_classifier(7)
    train(model, 16, num_classes=7)
    spt.save_delta(model, path)
    expected = predict(model, "vit")
    loaded = spt.load_delta(base("vit"), path)
    assert torch.equal(predict(loaded, "vit"), expected)
    assert_same_picture(spt.unload(loaded), picture(base("vit")))
    assert torch.equal(predict(spt.merge(model), "vit"), expected)


def test_a_tuned_weight_registered_anew(tmp_path: Path) -> None:
    """It requires a gradient, and is then trained whole; what it was before is not known."""
    path, model = tmp_path / "task.safetensors", tuned("vit", "unstructured")
    layer = model.blocks[0].mlp.fc1
    weight = layer.weight.detach() + 0.1
    weight.view(-1)[layer.index.long()] = layer.weight.detach().view(-1)[layer.index.long()]
    layer.weight = nn.Parameter(weight)
    expected = predict(model, "vit")
    before = picture(model)
    with pytest.raises(ValueError, match=r"base value of blocks\.0\.mlp\.fc1\.weight is not"):
        spt.unload(model)
    assert_same_picture(model, before)
    spt.save_delta(model, path)
    loaded = spt.load_delta(base("vit"), path)
    torch.testing.assert_close(predict(loaded, "vit"), expected)
    assert_same_picture(spt.unload(loaded), picture(base("vit")))
    with torch.no_grad():
        layer.weight.add_(0.1)  # the values of the delta among them
    for verb in (spt.unload, spt.merge, lambda model: spt.save_delta(model, path)):
        with pytest.raises(ValueError, match=r"fc1\.weight is trained whole besides its delta"):
            verb(model)


def test_a_layer_that_is_tuned_besides() -> None:
    model = tuned("vit", "unstructured")
    index = torch.tensor([1, 5])
    model.extra = spt.SparseDeltaLinear(nn.Linear(3, 3), index)
    before = picture(model)
    with pytest.raises(ValueError, match=r"extra\.weight is tuned, but not by the plan"):
        spt.unload(model)
    assert_same_picture(model, before)


def test_positions_of_another_plan(tmp_path: Path) -> None:
    model = tuned("vit", "unstructured")
    state = model.state_dict()
    name = next(n for n in state if n.endswith("fc1.index") and state[n][0] > 0)
    state[name][0] -= 1
    model.load_state_dict(state)
    with pytest.raises(ValueError, match="is trained at other positions than planned"):
        spt.save_delta(model, tmp_path / "task.safetensors")


def test_a_buffer_that_is_gone() -> None:
    model = base("vit")
    model.blocks[1].register_buffer("table", torch.ones(3))
    spt.apply(model, make_plan(model, "unstructured"))
    del model.blocks[1].table
    before = picture(model)
    for verb in (spt.unload, spt.merge):
        with pytest.raises(ValueError, match=r"the buffer blocks\.1\.table is gone"):
            verb(model)
        assert_same_picture(model, before)
