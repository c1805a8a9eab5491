"""`spt-kernels memory`: its JSON against estimates of our own, its bars against the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm

from spt_kernels.approximation import approximate, parse_approximation
from spt_kernels.cli import app
from spt_kernels.cli.memory_display import bars, cells_of
from spt_kernels.cli.terminal import Terminal
from spt_kernels.memory import MemoryEstimate, estimate_memory, figure, rows
from spt_kernels.memory.figure import memory_figure
from spt_kernels.memory.ledger import CATEGORIES
from spt_kernels.methods import Method, entry_of, make_plan, table_names
from tests.finetuning.pictures_on_disk import TINY

MODEL = ["-m", "vit_tiny_patch16_224", "--num-classes", "7"]
MODEL += [part for key, value in TINY.items() for part in ("--model-arg", f"{key}={value}")]


LESS = ("approximate", "recompute", "offload")


def model():
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)


def shape(batch: int) -> tuple[int, int, int, int]:
    return batch, 3, TINY["img_size"], TINY["img_size"]


def value_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert app.run(["memory", *MODEL, *arguments, "--json", "-q"]) == 0
    return json.loads(capsys.readouterr().out)


def one_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """The only method of the answer."""
    [(name, value)] = value_of(arguments, capsys)["methods"].items()
    assert name in (value["method"], "the plan")
    return value


def test_one_method_is_one_flat_object(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "full", "--batch", "64", "--dtype", "bf16", "--checkpointing"]
    value = one_of(arguments, capsys)
    estimate = estimate_memory(model(), shape(64), method="full", dtype="bf16", checkpointing=True)
    assert value["peak_bytes"] == estimate.peak_bytes == sum(value[name] for name in CATEGORIES)
    assert {name: value[name] for name in CATEGORIES} == estimate.by_category
    assert value["batch_shape"] == list(shape(64))
    assert value["num_trainable"] == estimate.num_trainable
    assert (value["method"], value["dtype"], value["checkpointing"]) == ("full", "bf16", True)
    assert value["accounted"] is True
    assert not any(isinstance(part, dict) for part in value.values())
    assert one_of([*arguments[:2], "--batch-size", "64", *arguments[4:]], capsys) == value


def test_approximate_gradients_are_accounted(capsys: pytest.CaptureFixture[str]) -> None:
    what = "gelu-2bit,layer-norm-from-output"
    found = value_of(["--method", "full", "--batch", "64", "--approximate", what], capsys)
    own = approximate(model(), **parse_approximation(what))
    estimate = estimate_memory(own, shape(64), method="full")
    assert found["approximate"] == what
    assert found["methods"]["full"]["peak_bytes"] == estimate.peak_bytes
    assert estimate.peak_bytes < estimate_memory(model(), shape(64), method="full").peak_bytes


def test_what_is_on_the_host_or_computed_again_is_accounted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    away = one_of(["--batch", "2", "--method", "linear", "--offload", "frozen"], capsys)
    expected = estimate_memory(model(), shape(2), method="linear", offload="frozen")
    assert (away["host_bytes"], away["peak_bytes"]) == (expected.host_bytes, expected.peak_bytes)
    options = ["--offload", "state", "--recompute", "block@0-1"]
    found = one_of(["--batch", "8", "--method", "full", *options], capsys)
    assert found["host_bytes"] >= 8 * found["num_trainable"] > 2 * found["optimizer"]
    again = estimate_memory(model(), shape(8), method="full", recompute="block")
    assert found["activations"] <= again.by_category["activations"]
    nothing = [part for what in LESS for part in (f"--{what}", "nothing")]
    assert app.run(["memory", *MODEL, "--method", "bias", *nothing]) == 0
    assert "cuda, adamw, bias\n" in capsys.readouterr().out, "nothing is done"
    assert app.run(["memory", *MODEL, "--method", "bias", "--recompute", "mlp@0"]) == 0
    assert "adamw, mlp@0 computed again, bias" in capsys.readouterr().out


def test_a_batch_in_parts_is_accounted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--batch", "64", "--method", "full"]
    whole, parts = (one_of([*arguments, *more], capsys) for more in ([], ["--micro-batch", "8"]))
    expected = estimate_memory(model(), shape(64), method="full", micro_batch=8)
    assert (parts["peak_bytes"], parts["micro_batch"]) == (expected.peak_bytes, 8)
    assert parts["peak_bytes"] < whole["peak_bytes"]
    assert whole["micro_batch"] is None
    assert one_of([*arguments, "--micro-batch", "64"], capsys) == whole, "all of it is one part"
    fits = ["--micro-batch", "8", "--fits", "0.01"]
    [found] = one_of([*arguments, *fits], capsys)["fits"]
    for images, is_within in ((found["batch"], True), (found["batch"] + 1, False)):
        own = estimate_memory(model(), shape(images), method="full", micro_batch=8)
        assert (own.peak_bytes <= found["limit_bytes"]) is is_within
    assert app.run(["memory", *MODEL, *arguments, "--micro-batch", "8", "-q"]) == 0
    assert "64 × 3 × 16 × 16, 8 at a time, fp32, cuda, adamw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reserve", "1"], "--reserve: is kept free of what --fits names"),
        (["--inference", "--budget", "0.1"], "--budget: inference is of the plain model; name a"),
        (["--inference", "--from-block", "1"], "--from-block: inference is of the plain model"),
        (["--dtype", "fp16"], "--dtype must be one of fp32, bf16-autocast, bf16, got 'fp16'"),
        (["--optimizer", "lion"], "--optimizer must be 'adamw', 'sgd', 'none' or a function"),
        (["--micro-batch", "0"], "--micro-batch: expected at least 1, got 0"),
        (["--micro-batch", "2", "--inference"], "--micro-batch: inference sums up no gradients"),
        (
            ["--offload", "state", "--optimizer", "sgd"],
            "--offload: state is that of adamw, got",
        ),
        (["--offload", "state", "--inference"], "--offload: state is that of adamw, got"),
        (
            ["--offload", "state", "--method", "bias"],
            "--offload: 'bias' has next to no state to keep",
        ),
        (
            ["--offload", "frozen", "--method", "full"],
            "--offload: expected blocks with frozen matr",
        ),
        (["--recompute", "mlp", "--inference"], "--recompute: inference has no backward"),
        (["--recompute", "mlp@9"], "--recompute: the model has 2 blocks, from 0 on, got 'mlp@9'"),
    ],
)
def test_what_cannot_be_offloaded_or_computed_again(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["memory", *MODEL, *options]) == 2
    assert message in capsys.readouterr().err


def test_all_methods_are_objects_of_the_same_kind(capsys: pytest.CaptureFixture[str]) -> None:
    value = value_of(["--batch", "3", "--rank", "2", "--budget", "900"], capsys)
    methods = value["methods"]
    # a module as wide as the model has more entries than any of its matrices
    assert list(value["missing"]) == ["sensitive-adapter-32", "sensitive-lora-16"]
    names = [*methods, *value["missing"]]
    assert names == [n for n in table_names() if not entry_of(n).is_baseline]
    for name, one in methods.items():
        options = entry_of(name).options
        sized = {"rank": 2} if "rank" in options and name != "adaptformer" else {}
        sized |= {"budget": 900} if "budget" in options and name != "lora" else {}
        if name in ("lora", "adaptformer", "spt-adapter"):  # which take other options each
            estimate = estimate_memory(model(), shape(3), method=name, **sized)
            assert one["peak_bytes"] == estimate.peak_bytes, name
        assert one["method"] == name
        assert one["made_up_scores"] is ("samples" in options)
        assert one["trained"] == one["num_trainable"] - 7 * (TINY["embed_dim"] + 1)
        assert one["trained_share"] == one["trained"] / methods["full"]["trained"]
    again = value_of(["--batch", "3", "--method", "lora-16"], capsys)
    # of one form, however many there are
    assert again == {**value, "methods": {"lora-16": methods["lora-16"]}, "missing": {}}
    assert value["optimizer_name"] == "adamw"


def test_a_method_that_the_model_does_not_admit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "-m", "resnet10t", "--batch", "2", "--image-size", "64", "-q"]
    assert app.run([*arguments, "--method", "adapter-8,spt-unstructured"]) == 0
    text = capsys.readouterr().out
    assert "adapter-8: left out, method: an Adapter goes on the last" in text
    assert "spt-unstructured" in text
    assert app.run([*arguments, "--method", "adapter-8"]) == 2
    assert "8 × 3×3 convolution" in capsys.readouterr().err


BEIT = ["memory", "-m", "beit_base_patch16_224", "--image-size", "32", "--batch", "2", "-q"]
BEIT += [
    part for key in ("embed_dim=24", "depth=1", "num_heads=2") for part in ("--model-arg", key)
]


def test_a_model_that_reads_its_weights_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of what has to stand for `qkv` are left out, and all others there."""
    names = "full,lora,lora-16,prompt-deep,spt-lora,spt-unstructured"
    assert app.run([*BEIT, "--json", "--method", names]) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value["missing"]) == {"lora", "lora-16", "prompt-deep"}
    for name in ("lora", "lora-16"):
        assert "nothing can stand for blocks.0.attn.qkv" in value["missing"][name]
    assert "tied to their places by relative_position_index" in value["missing"]["prompt-deep"]
    assert set(value["methods"]) == {"full", "spt-lora", "spt-unstructured"}
    assert all(one["peak_bytes"] > 0 for one in value["methods"].values())


def test_whatever_a_row_fails_with_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(base: object, method: Method, *scores: object) -> None:
        if method.name == "bias":
            raise RuntimeError("of the model's\n own")
        return make_plan(base, method, *scores)

    monkeypatch.setattr(rows, "make_plan", fails)
    arguments = ["--batch", "2", "--method", "full,bias"]
    value = value_of(arguments, capsys)
    assert list(value["methods"]) == ["full"]
    assert value["missing"] == {"bias": "RuntimeError: of the model's own"}
    assert app.run(["memory", *MODEL, *arguments, "-q"]) == 0
    assert "bias: left out, RuntimeError: of the model's own" in capsys.readouterr().out
    assert app.run(["memory", *MODEL, "--method", "bias", "-q"]) == 2
    assert capsys.readouterr().err == "spt-kernels: RuntimeError: of the model's own\n"
    with pytest.raises(RuntimeError, match="of the model"):
        app.run(["memory", *MODEL, *arguments, "--debug", "-q"])


def test_a_plan_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(model(), Method("lora", rank=3))
    assert plan is not None
    plan.save(tmp_path / "my.plan")
    arguments = ["--plan", str(tmp_path / "my.plan"), "--batch", "2"]
    one = one_of([*arguments, "--method", "lora"], capsys)
    assert one["peak_bytes"] == estimate_memory(model(), shape(2), plan).peak_bytes
    assert one["made_up_scores"] is False
    both = value_of(arguments, capsys)["methods"]
    assert both["the plan"]["peak_bytes"] == one["peak_bytes"]
    alone = one_of([*arguments, "--inference"], capsys)
    assert alone["training"] is False
    assert alone["peak_bytes"] < one["peak_bytes"]


def test_blocks_that_are_left_alone_keep_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "spt-unstructured", "--batch", "16", "-b", "300"]
    all_, late = (one_of([*arguments, *more], capsys) for more in ([], ["--from-block", "1"]))
    assert late["activations"] < 0.8 * all_["activations"]
    assert late["trained"] == all_["trained"]


def test_inference_is_of_the_plain_model(capsys: pytest.CaptureFixture[str]) -> None:
    value = one_of(["--inference", "--batch", "5"], capsys)
    estimate = estimate_memory(model(), shape(5), training=False)
    assert (value["method"], value["peak_bytes"]) == ("plain", estimate.peak_bytes)


def test_the_largest_batches(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "full", "--batch", "8", "--fits", "0.01,0.0001,0.004"]
    value = one_of([*arguments, "--reserve", "0.00005"], capsys)
    assert [found["gib"] for found in value["fits"]] == [0.0001, 0.004, 0.01]
    for found in value["fits"]:
        limit = int((found["gib"] - 0.00005) * 2**30)
        assert found["limit_bytes"] == limit
        for batch, peak in (("batch", "peak_bytes"), ("beyond", "peak_bytes_of_one_more")):
            images = found["batch"] + (batch == "beyond")
            if images:
                own = estimate_memory(model(), shape(images), method="full").peak_bytes
                assert found[peak] == own
                assert (own <= limit) is (batch == "batch")
    none = value["fits"][0]
    assert none["batch"] == 0
    ways = [(o["dtype"], o["checkpointing"]) for o in value["smallest_step_otherwise"]]
    assert ways == [("fp32", True), ("bf16", False), ("bf16", True)]
    for other in value["smallest_step_otherwise"]:
        how = {"dtype": other["dtype"], "checkpointing": other["checkpointing"]}
        own = estimate_memory(model(), shape(1), method="full", **how).peak_bytes
        assert other["peak_bytes"] == own


def test_nothing_helps_where_nothing_can(capsys: pytest.CaptureFixture[str]) -> None:
    # VGG cannot recompute its blocks
    arguments = ["memory", "-m", "vgg11", "--method", "linear", "--batch", "1", "--fits", "0.01"]
    assert app.run([*arguments, "--json", "-q"]) == 0
    [other] = json.loads(capsys.readouterr().out)["methods"]["linear"]["smallest_step_otherwise"]
    assert (other["dtype"], other["checkpointing"]) == ("bf16", False)
    assert app.run([*arguments, "--dtype", "bf16", "-q"]) == 0
    out = capsys.readouterr().out
    assert "none (0." in out
    assert "otherwise" not in out


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}),
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 2, 1]}),
    ],
)
def test_images_of_another_size(
    name: str, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory", "-m", name, "--method", "linear", "--batch", "2", "--json", "-q"]
    for option, value in small.items():
        arguments += ["--model-arg", f"{option}={value}"]
    assert app.run([*arguments, "--image-size", "448"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]["linear"]
    assert found["batch_shape"] == [2, 3, 448, 448]
    sized = {} if name == "resnet18" else {"img_size": 448}
    own = timm.create_model(name, num_classes=100, **small, **sized)
    assert found["peak_bytes"] == estimate_memory(own, (2, 3, 448, 448), method="linear").peak_bytes


def test_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, MemoryEstimate]] = []

    def drawn(estimates: dict[str, MemoryEstimate], **title: str) -> object:
        seen.append(estimates)
        return memory_figure(estimates, **title)

    monkeypatch.setattr(figure, "memory_figure", drawn)
    value_of(["--method", "full,spt-lora", "--batch", "2", "-o", str(tmp_path / "m.png")], capsys)
    assert {name: e.made_up_scores for name, e in seen[0].items()} == {
        "full": False,
        "spt-lora": True,
    }
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def estimate(*parts: int) -> MemoryEstimate:
    by_category = dict(zip(CATEGORIES, parts, strict=True))
    return MemoryEstimate(sum(parts), by_category, "full", (8, 3, 4, 4), "fp32", True, 7)


def test_bars_are_as_long_as_what_they_show(capsys: pytest.CaptureFixture[str]) -> None:
    gib = 2**30
    two = {"full": estimate(gib, 2 * gib, gib, 4 * gib, 0), "linear": estimate(gib, 0, 0, 0, gib)}
    terminal = Terminal()
    terminal.show({}, bars(two, 80))
    full, linear, legend = capsys.readouterr().out.splitlines()
    room = full.count("█") * 8  # the eighth that the weights are
    assert 60 <= room <= 72
    assert max(len(full), len(linear), len(legend)) <= 80
    cells = {sign: full.count(sign) for sign in "█▓▒░·"}
    for sign, share in zip("█▓▒░·", (1, 2, 1, 4, 0), strict=True):
        assert cells[sign] == pytest.approx(share * room / 8, abs=1)
    assert linear.count("█") == full.count("█")
    assert full.endswith(" 8.00 GiB")
    assert linear.endswith(" 2.00 GiB")
    assert " ".join(legend.split()) == (
        "█ weights ▓ optimizer ▒ gradients ░ activations · temporary"
    )


def test_cells_add_up() -> None:
    assert cells_of([1, 1, 1], 1 / 3 * 10) == [3, 4, 3]
    assert cells_of([0, 5, 0], 2) == [0, 10, 0]
    assert sum(cells_of([7] * 9, 0.1)) == 6


@pytest.mark.parametrize(("device", "has_context"), [("cuda", True), ("cpu", False)])
def test_only_a_card_has_a_cuda_context(
    device: str, has_context: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--method", "full", "--batch", "2", "--device", device, "-q"]
    assert app.run(["memory", *MODEL, *arguments]) == 0
    assert ("CUDA context" in capsys.readouterr().out) == has_context
