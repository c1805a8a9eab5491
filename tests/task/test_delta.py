"""Saving, loading, swapping, merging and dropping tasks, by architecture and kind of tuning."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.files import container
from spt_kernels.layers import sparse_deltas
from spt_kernels.model import candidate_names, describe, head_names
from spt_kernels.plan import AdapterSpec, LoraSpec, Plan
from spt_kernels.task.file.format import read
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit

MODELS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "vit": (tiny_vit, 16),
    "swin": (tiny_swin, 32),
    "convnext": (tiny_convnext, 32),
}
KINDS = ("unstructured", "lora", "adapter")
every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_plan(
    model: nn.Module,
    kind: str,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Random positions in every candidate, and a structured module on every third linear layer."""
    generator = torch.Generator().manual_seed(seed)
    info = describe(model)
    unstructured: dict[str, Tensor] = {}
    structured: dict[str, LoraSpec | AdapterSpec] = {}
    names = candidate_names(model, include, exclude)
    linear = [name for name in names if info[name].kind == "linear"]
    for name in names:
        chosen = torch.rand(info[name].shape, generator=generator) < 0.1
        if kind != "unstructured" and name in linear[::3]:
            # the first and last slice of a fused qkv, all of any other matrix
            blocks = sorted({info[name].row_blocks[0], info[name].row_blocks[-1]}, key=str)
            rows = tuple(sorted((block.start, block.stop) for block in blocks))
            if kind == "lora":
                structured[name] = LoraSpec(2, rows, info[name].shape[1], scale=0.5, dropout=0.0)
            else:
                structured[name] = AdapterSpec(2, rows)
            for start, stop in rows:
                chosen[start:stop] = False
        positions = chosen.flatten().nonzero().flatten()
        if len(positions):
            unstructured[name] = positions
    used = {name: info[name] for name in names}
    return Plan(unstructured, structured, used, head=head_names(model), model_name="tiny")


def train(model: nn.Module, size: int, *, num_classes: int = 5, seed: int = 1) -> nn.Module:
    """Three real steps: every trained value moves away from its start."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, eps=1e-4)  # 1e-8 is zero in fp16
    images, labels = tiny_batch(size=size, num_classes=num_classes, seed=seed)
    images = images.to(next(model.parameters()).dtype)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def tuned(name: str, kind: str, *, seed: int = 0, num_classes: int = 5) -> nn.Module:
    model, size = base(name, num_classes=num_classes), MODELS[name][1]
    spt.apply(model, make_plan(model, kind, seed))
    return train(model, size, num_classes=num_classes, seed=seed + 1)


def base(name: str, *, num_classes: int = 5) -> nn.Module:
    """Always the same backbone; the values of a head of its own size are drawn anew."""
    model = MODELS[name][0]()
    if num_classes != 5:
        model.reset_classifier(num_classes)
        if num_classes:
            nn.init.normal_(model.get_classifier().weight)
    return model


@torch.no_grad()
def predict(model: nn.Module, name: str) -> Tensor:
    images, _ = tiny_batch(size=MODELS[name][1], seed=9)
    return model(images.to(next(model.parameters()).dtype)).float()


def picture(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a failed call must leave as it was."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "tuned": hasattr(model, "spt_tuning"),
    }


def assert_same_picture(model: nn.Module, before: dict[str, object]) -> None:
    after = picture(model)
    tensors, expected = after.pop("tensors"), dict(before)
    expected_tensors = expected.pop("tensors")
    assert after == expected
    assert isinstance(tensors, dict)
    assert isinstance(expected_tensors, dict)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


@every_model
@every_kind
def test_a_fresh_base_predicts_the_same(name: str, kind: str, tmp_path: Path) -> None:
    model, path = tuned(name, kind), tmp_path / "task.safetensors"
    assert spt.save_delta(model, path) == path.stat().st_size
    fresh = base(name)
    before = predict(fresh, name)
    assert spt.load_delta(fresh, path) is fresh
    assert torch.equal(predict(fresh, name), predict(model, name))
    assert not torch.equal(predict(fresh, name), before)
    again = tmp_path / "again.safetensors"
    spt.save_delta(fresh, again)
    assert again.read_bytes() == path.read_bytes()


@every_model
@every_kind
def test_unload_gives_the_base_back(name: str, kind: str) -> None:
    model = base(name)
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    modules = dict(model.named_modules())
    before = picture(model)
    spt.apply(model, make_plan(model, kind))
    train(model, MODELS[name][1])
    assert spt.unload(model) is model
    assert_same_picture(model, before)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_vit().to(dtype)
    before = picture(model)
    spt.apply(model, make_plan(model, "lora"))
    train(model, 16)
    path = tmp_path / "task.safetensors"
    spt.save_delta(model, path)
    expected = predict(model, "vit")
    fresh = tiny_vit().to(dtype)
    spt.load_delta(fresh, path)
    assert torch.equal(predict(fresh, "vit"), expected)
    assert_same_picture(spt.unload(model), before)
    assert_same_picture(spt.unload(fresh), before)


@every_model
@pytest.mark.parametrize("kind", ["unstructured", "lora"])
def test_merge_gives_a_plain_model(name: str, kind: str) -> None:
    plain, model = base(name), tuned(name, kind)
    expected = predict(model, name)
    assert spt.merge(model) is model
    assert not hasattr(model, "spt_tuning")
    now, before = picture(model), picture(plain)
    for part in ("types", "hooks", "grads"):
        assert now[part] == before[part]
    assert model.state_dict().keys() == plain.state_dict().keys()
    if kind == "unstructured":
        assert torch.equal(predict(model, name), expected)
    else:
        torch.testing.assert_close(predict(model, name), expected, rtol=1e-4, atol=1e-5)


def test_merge_is_the_exact_sum_rounded_once() -> None:
    model = tiny_vit().bfloat16()
    plan = make_plan(model, "lora")
    spt.apply(model, plan)
    train(model, 16)
    name = "blocks.0.attn.qkv.weight"
    assert name in plan.structured
    spec, layer = plan.structured[name], model.blocks[0].attn.qkv
    assert isinstance(spec, LoraSpec)
    weight = layer.plain.weight.detach().clone()
    expected, first = weight.double(), 0
    for i, (start, stop) in enumerate(spec.rows):
        a = layer.lora_a[i * spec.rank : (i + 1) * spec.rank].double()
        b = layer.lora_b[first : first + stop - start].double()
        expected[start:stop] += spec.scale * (b @ a)
        first += stop - start
    spt.merge(model)
    merged = model.blocks[0].attn.qkv.weight.detach()
    # fp32 and float64 may fall on two sides of a bf16 rounding boundary: one unit in the last place
    torch.testing.assert_close(merged, expected.detach().bfloat16(), rtol=2**-7, atol=0)
    assert (merged == expected.bfloat16()).float().mean() > 0.99
    rest = torch.ones(len(weight), dtype=torch.bool)
    for start, stop in spec.rows:
        rest[start:stop] = False
    assert rest.any()
    assert torch.equal(merged[rest], weight[rest])


def test_a_merged_model_is_another_base(saved: Path) -> None:
    model = spt.merge(spt.load_delta(base("vit"), saved))
    with pytest.raises(spt.BaseModelMismatch, match="the weights differ"):
        spt.load_delta(model, saved)


def test_merge_refuses_an_adapter_and_names_it() -> None:
    model = tuned("vit", "adapter")
    before = picture(model)
    with pytest.raises(ValueError, match=r"cannot merge blocks\.0\.attn\.qkv\.weight: an Adapter"):
        spt.merge(model)
    assert_same_picture(model, before)


@pytest.mark.parametrize("verb", [spt.merge, spt.unload], ids=["merge", "unload"])
def test_an_untuned_model_has_nothing_to_undo(verb: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match="not tuned"):
        verb(tiny_vit())


def test_something_else_than_a_model(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    swapped = cast(nn.Module, path)
    for call in (
        lambda: spt.merge(swapped),
        lambda: spt.unload(swapped),
        lambda: spt.save_delta(swapped, path),
        lambda: spt.load_delta(swapped, path),
    ):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got PosixPath"):
            call()


def test_an_untuned_model_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not tuned"):
        spt.save_delta(tiny_vit(), tmp_path / "task.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_two_tasks_swapped_back_and_forth(first: str, second: str, tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    expected = []
    for seed, (kind, path) in enumerate(zip((first, second), paths, strict=True)):
        model = tuned("vit", kind, seed=seed)
        spt.save_delta(model, path)
        expected.append(predict(model, "vit"))
    model = base("vit")
    plain = picture(model)
    for i in (0, 1, 0, 0, 1):
        spt.load_delta(model, paths[i])
        assert torch.equal(predict(model, "vit"), expected[i])
    assert_same_picture(spt.unload(model), plain)


@pytest.mark.parametrize("named", [True, False], ids=["named-head", "unnamed-head"])
def test_a_swap_of_the_same_structure_keeps_the_parameters(named: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = base("vit")
    plan = make_plan(model, "lora")
    spt.apply(model, plan if named else replace(plan, head=()))
    train(model, 16)
    expected = predict(model, "vit")
    spt.save_delta(model, path)
    train(model, 16, seed=5)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert not torch.equal(predict(model, "vit"), expected)
    spt.load_delta(model, path)
    assert torch.equal(predict(model, "vit"), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_a_swap_to_a_weight_that_the_model_reads_itself_tunes_it_in_place(tmp_path: Path) -> None:
    """The same positions, but a layer in whose place another would never be called."""
    path = tmp_path / "a.safetensors"
    model = base("vit")
    called = make_plan(model, "unstructured")
    name = "blocks.0.attn.qkv.weight"
    info = {**called.info, name: replace(called.info[name], kind="functional")}
    spt.apply(model, replace(called, info=info))
    train(model, 16)
    spt.save_delta(model, path)

    other = spt.apply(base("vit"), called)
    assert isinstance(other.blocks[0].attn.qkv, spt.SparseDeltaLinear)
    spt.load_delta(other, path)
    assert not isinstance(other.blocks[0].attn.qkv, spt.SparseDeltaLinear)
    assert torch.equal(predict(other, "vit"), predict(model, "vit"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_task_files_load_exactly_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    full, half, again = (tmp_path / f"{n}.safetensors" for n in ("full", "half", "again"))
    model = tuned("vit", "lora")
    spt.save_delta(model, full)
    assert spt.save_delta(model, half, dtype) < full.stat().st_size
    fresh = spt.load_delta(base("vit"), half)
    spt.save_delta(fresh, again)  # as loaded, in fp32
    exact, loaded = read(full), read(again)
    for name, values in exact.values.items():
        assert torch.equal(loaded.values[name], values.to(dtype).float())
    for name, tensor in exact.dense.items():
        assert torch.equal(loaded.dense[name], tensor.to(dtype).float())
    for name, parts in exact.structured.items():
        for local, part in parts.items():
            assert torch.equal(loaded.structured[name][local], part.to(dtype).float())
    spt.save_delta(fresh, again, dtype)
    assert again.read_bytes() == half.read_bytes()


def test_a_head_of_another_number_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = tuned("vit", "lora", num_classes=7)
    spt.save_delta(model, path)
    fresh = base("vit", num_classes=3)
    head, before = fresh.head, picture(fresh)
    spt.load_delta(fresh, path)
    assert torch.equal(predict(fresh, "vit"), predict(model, "vit"))
    assert fresh.num_classes == 7
    assert fresh.head.weight.requires_grad
    spt.load_delta(fresh, path)  # a swap with the replaced head in place
    five = tuned("vit", "unstructured", num_classes=5, seed=3)
    spt.save_delta(five, path)
    spt.load_delta(fresh, path)
    assert torch.equal(predict(fresh, "vit"), predict(five, "vit"))
    spt.unload(fresh)
    assert fresh.head is head
    assert fresh.num_classes == 3
    assert_same_picture(fresh, before)


@pytest.mark.parametrize("num_classes", [5, 3])
def test_a_class_token_may_be_part_of_the_head(num_classes: int, tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", base("vit")
    plan = make_plan(model, "lora")
    head = head_names(model, ["head", "cls_token"])
    spt.apply(model, replace(plan, head=head))
    train(model, 16)
    spt.save_delta(model, path)
    fresh = base("vit", num_classes=num_classes)
    before = picture(fresh)
    spt.load_delta(fresh, path)
    assert not torch.equal(fresh.cls_token, base("vit").cls_token)
    assert torch.equal(predict(fresh, "vit"), predict(model, "vit"))
    assert_same_picture(spt.unload(fresh), before)


def test_a_base_without_a_head_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = tuned("vit", "unstructured")
    spt.save_delta(model, path)
    fresh = base("vit", num_classes=0)
    before = picture(fresh)
    spt.load_delta(fresh, path)
    assert torch.equal(predict(fresh, "vit"), predict(model, "vit"))
    assert_same_picture(spt.unload(fresh), before)


def test_another_fully_trained_tensor_travels_too(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = base("vit")
    spt.apply(model, make_plan(model, "lora"))
    model.cls_token.requires_grad_(True)
    train(model, 16)
    spt.save_delta(model, path)
    fresh = base("vit")
    before = picture(fresh)
    spt.load_delta(fresh, path)
    assert torch.equal(predict(fresh, "vit"), predict(model, "vit"))
    again = tmp_path / "again.safetensors"
    spt.save_delta(fresh, again)
    assert again.read_bytes() == path.read_bytes()
    assert_same_picture(spt.unload(fresh), before)
    kept = picture(model)
    with pytest.raises(ValueError, match="cls_token"):
        spt.unload(model)  # its value before training is not known here
    assert_same_picture(model, kept)


@pytest.mark.parametrize(
    ("name", "include"),
    [
        ("vit", ["cls_token", "pos_embed", "patch_embed.*"]),
        ("swin", ["*relative_position_bias_table", "patch_embed.*"]),
        ("convnext", ["*.gamma", "stem.*"]),
    ],
    ids=["vit", "swin", "convnext"],
)
def test_tokens_tables_scales_and_stem(name: str, include: list[str], tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = base(name)
    plan = make_plan(model, "lora", include=include)
    before = picture(model)
    spt.apply(model, plan)
    train(model, MODELS[name][1])
    spt.save_delta(model, path)
    fresh = spt.load_delta(base(name), path)
    expected = predict(model, name)
    assert torch.equal(predict(fresh, name), expected)
    assert_same_picture(spt.unload(fresh), before)
    assert_same_picture(spt.unload(model), before)
    spt.merge(spt.load_delta(fresh, path))
    assert picture(fresh)["types"] == before["types"]
    torch.testing.assert_close(predict(fresh, name), expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_two_names_counts_once(tmp_path: Path) -> None:
    def named_twice() -> nn.Module:
        model = base("vit")
        model.fc = model.head
        return model

    path, model = tmp_path / "task.safetensors", named_twice()
    before = picture(model)
    spt.apply(model, make_plan(model, "unstructured"))
    train(model, 16)
    spt.save_delta(model, path)
    assert torch.equal(predict(spt.load_delta(named_twice(), path), "vit"), predict(model, "vit"))
    assert_same_picture(spt.unload(model), before)


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential()
    net.body, net.head = nn.Sequential(*layers), nn.Linear(64, 5)
    return net


def test_running_statistics_travel_with_the_task(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", batch_norm_net()
    spt.apply(model, make_plan(model, "unstructured"))
    train(model.train(), 16).eval()
    spt.save_delta(model, path)
    fresh = batch_norm_net().eval()
    before = picture(fresh)
    spt.load_delta(fresh, path)
    assert torch.equal(predict(fresh, "vit"), predict(model, "vit"))
    assert_same_picture(spt.unload(fresh), before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "task.safetensors"
    spt.save_delta(tuned("vit", "lora"), path)
    return path


def one_weight_off() -> nn.Module:
    model = base("vit")
    with torch.no_grad():
        # one unit in the last place, in an element that no task touches
        weight = model.blocks[1].mlp.fc2.weight.view(torch.int32)
        weight[3, 3] ^= 1
    return model


WRONG_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other-weights": (lambda: tiny_vit(7), r"blocks\.0\.\S+: the weights differ"),
    "one-bit": (one_weight_off, r"blocks\.1\.mlp\.fc2\.weight: the weights differ"),
    "other-width": (lambda: tiny_vit(width=48), r"expected shape \[\d+"),
    "other-architecture": (tiny_swin, "no parameter"),
    "fewer-blocks": (lambda: tiny_vit(depth=1), r"no parameter blocks\.1"),
    "bf16": (lambda: tiny_vit().bfloat16(), "expected float32 weights, got bfloat16"),
}


@pytest.mark.parametrize("case", WRONG_BASES)
@pytest.mark.parametrize("state", ["plain", "tuned"])
def test_another_base_is_refused_and_left_alone(saved: Path, case: str, state: str) -> None:
    build, message = WRONG_BASES[case]
    model = build()
    if state == "tuned":
        spt.apply(model, make_plan(model, "adapter", seed=4))
    before = picture(model)
    with pytest.raises(spt.BaseModelMismatch, match=message) as caught:
        spt.load_delta(model, saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same_picture(model, before)


@pytest.mark.parametrize("state", ["plain", "tuned"])
def test_a_damaged_file_leaves_the_model_alone(saved: Path, tmp_path: Path, state: str) -> None:
    model = tuned("vit", "lora", seed=2) if state == "tuned" else base("vit")
    before, file = picture(model), saved.read_bytes()
    path = tmp_path / "damaged.safetensors"
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(file), (20,), generator=generator).tolist()
    for damaged in [
        *(file[:i] + bytes([file[i] ^ 4]) + file[i + 1 :] for i in places),
        *(file[:i] for i in places),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(spt.DeltaFormatError, match=r"damaged\.safetensors"):
            spt.load_delta(model, path)
    with pytest.raises(FileNotFoundError):
        spt.load_delta(model, tmp_path / "none.safetensors")
    assert_same_picture(model, before)


def test_a_head_that_does_not_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    metadata, tensors = container.unpack(saved.read_bytes())
    path = tmp_path / "task.safetensors"
    for bad in ({"dense/head.weight": torch.zeros(5, 99)}, {"dense/head.bias": torch.zeros(6)}):
        path.write_bytes(container.pack(metadata, {**tensors, **bad}))
        model = base("vit")
        before = picture(model)
        with pytest.raises(spt.BaseModelMismatch, match=r"head\."):
            spt.load_delta(model, path)
        assert_same_picture(model, before)


def test_a_failure_half_way_puts_the_old_task_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned("vit", "adapter", seed=2)
    before, expected = picture(model), predict(model, "vit")
    calls = []

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        fill(*arguments)

    from spt_kernels.task.transfer import fill

    monkeypatch.setattr("spt_kernels.task.transfer.fill", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        spt.load_delta(model, saved)
    assert torch.equal(predict(model, "vit"), expected)
    assert_same_picture(model, before)


def test_a_failure_among_new_values_puts_the_old_ones_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "task.safetensors"
    model = tuned("vit", "lora")
    spt.save_delta(model, path)
    train(model, 16, seed=5)
    before, expected = picture(model), predict(model, "vit")
    calls = []

    def failing(deltas: object) -> None:
        calls.append(deltas)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        write(deltas)

    from spt_kernels.layers import write_deltas as write

    monkeypatch.setattr("spt_kernels.task.transfer.write_deltas", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        spt.load_delta(model, path)
    assert torch.equal(predict(model, "vit"), expected)
    assert_same_picture(model, before)


def test_a_diverged_task_can_be_swapped_for_another(saved: Path) -> None:
    model = tuned("vit", "unstructured", seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    spt.load_delta(model, saved)
    assert torch.equal(predict(model, "vit"), predict(spt.load_delta(base("vit"), saved), "vit"))


IN_PLACE: dict[str, Callable[[Tensor, int], object]] = {
    "in_place": lambda weight, i: weight.view(-1)[i].add_(1),
    "data": lambda weight, i: weight.data.view(-1)[i].add_(1),
    "numpy": lambda weight, i: weight.detach().numpy().reshape(-1).__setitem__(i, 7.0),
    "one_bit": lambda weight, i: weight.detach().view(torch.int32).view(-1)[i].bitwise_xor_(1),
}


@torch.no_grad()
@pytest.mark.parametrize("how", IN_PLACE)
def test_a_base_changed_under_a_task_is_noticed(how: str, saved: Path) -> None:
    """Even where autograd's versions cannot see it, and at positions that no task touches."""
    model = spt.load_delta(base("vit"), saved)
    for name, delta in sparse_deltas(model).items():
        touched = set(delta.index.tolist())
        untouched = next(i for i in range(delta.target.numel()) if i not in touched)
        kept = delta.target.clone()
        IN_PLACE[how](delta.target, untouched)
        before = picture(model)
        with pytest.raises(spt.BaseModelMismatch, match=re.escape(f"{name}: the weights differ")):
            spt.load_delta(model, saved)
        assert_same_picture(model, before)
        delta.target.copy_(kept)
    spt.load_delta(model, saved)


@pytest.mark.parametrize("sparse", ["head.bias", "head.weight"])
def test_half_a_head_among_the_sparse(sparse: str, saved: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", base("vit")
    whole = make_plan(model, "unstructured", include=[sparse])
    others = tuple(name for name in head_names(model) if name != sparse)
    spt.apply(model, replace(whole, head=others))
    train(model, 16)
    spt.save_delta(model, path)
    expected = predict(model, "vit")
    fresh = base("vit")
    before = picture(fresh)
    assert torch.equal(predict(spt.load_delta(fresh, path), "vit"), expected)
    spt.load_delta(fresh, saved)
    assert torch.equal(predict(spt.load_delta(fresh, path), "vit"), expected)
    spt.save_delta(tuned("vit", "lora", num_classes=7), tmp_path / "seven.safetensors")
    assert spt.load_delta(fresh, tmp_path / "seven.safetensors").head.out_features == 7
    with pytest.raises(spt.BaseModelMismatch, match=r"head\.\w+: expected shape \[5"):
        spt.load_delta(base("vit", num_classes=3), path)
    assert_same_picture(spt.unload(fresh), before)


def test_values_that_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = tuned("vit", "lora")
    spt.save_delta(model, path)
    file = path.read_bytes()
    with torch.no_grad():
        model.head.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"head\.bias.* too large for float16"):
        spt.save_delta(model, path, torch.float16)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.bias.* NaN"):
        spt.save_delta(model, path)
    with pytest.raises(ValueError, match="dtype must be"):
        spt.save_delta(model, path, torch.float64)
    assert path.read_bytes() == file
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("named", [True, False], ids=["named-head", "unnamed-head"])
def test_head_only(named: bool, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    model = base("vit", num_classes=7)
    spt.apply(model, Plan({}, {}, {}, head=head_names(model) if named else ()))
    train(model, 16, num_classes=7)
    spt.save_delta(model, path)
    assert torch.equal(predict(spt.load_delta(base("vit"), path), "vit"), predict(model, "vit"))
    with pytest.raises(spt.BaseModelMismatch, match="the weights differ"):
        spt.load_delta(tiny_vit(7), path)


def test_a_task_loaded_in_inference_mode_can_be_trained_on(saved: Path) -> None:
    expected = predict(spt.load_delta(base("vit"), saved), "vit")
    model = base("vit")
    for _ in range(2):  # put on, then swapped
        with torch.inference_mode():
            spt.load_delta(model, saved)
            assert torch.equal(predict(model, "vit"), expected)
        train(model, 16)
        assert not torch.equal(predict(model, "vit"), expected)


def test_compiled_and_wrapped_models(saved: Path, tmp_path: Path) -> None:
    expected = predict(spt.load_delta(base("vit"), saved), "vit")
    model = base("vit")
    before = picture(model)
    compiled = torch.compile(model, backend="eager")
    predict(compiled, "vit")
    assert spt.load_delta(compiled, saved) is compiled
    torch.testing.assert_close(predict(compiled, "vit"), expected)
    spt.save_delta(compiled, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    spt.unload(compiled)
    assert_same_picture(model, before)


def test_data_parallel_models_keep_their_parameters(saved: Path, tmp_path: Path) -> None:
    model = base("vit")
    wrapped = nn.DataParallel(model)
    for verb in (spt.unload, spt.merge):
        with pytest.raises(ValueError, match="not tuned"):
            verb(wrapped)
    with pytest.raises(ValueError, match="load the task before"):
        spt.load_delta(wrapped, saved)
    spt.load_delta(model, saved)
    before = picture(model)
    with pytest.raises(ValueError, match="data parallel"):
        spt.unload(wrapped)
    spt.load_delta(wrapped, saved)  # the same structure: values alone
    assert_same_picture(model, before)
    spt.save_delta(wrapped, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_a_copied_model_is_its_own(saved: Path) -> None:
    model = spt.load_delta(base("vit"), saved)
    twin = copy.deepcopy(model)
    before = picture(model)
    spt.unload(twin)
    assert_same_picture(twin, picture(base("vit")))
    assert_same_picture(model, before)


@pytest.mark.gpu
def test_another_device(saved: Path) -> None:
    model = spt.load_delta(base("vit").cuda(), saved)
    expected = spt.load_delta(base("vit"), saved).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name]), name
    before = base("vit").state_dict()
    for name, tensor in spt.unload(model).state_dict().items():
        assert torch.equal(tensor.cpu(), before[name]), name
