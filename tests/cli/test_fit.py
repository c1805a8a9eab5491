"""`spt-kernels fit`: what is shown, what a machine reads, what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from spt_kernels.cli.app import run
from spt_kernels.cli.fit import FittingOptions, _besides
from spt_kernels.finetuning import ModelSource
from tests.cli.test_commands import complaint_of, output_of
from tests.finetuning.pictures_on_disk import write_task, write_weights
from tests.finetuning.undrawn import draw_nothing

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
MODEL = ["-m", "vit_tiny_patch16_224"]
MODEL += [word for key, value in TINY.items() for word in ("--model-arg", f"{key}={value}")]
FIT = ["fit", *MODEL, "--num-classes", "5", "--batch", "16", "--reserve", "0", "-q"]


def test_ways_of_two_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "ways.png"
    asked = [*FIT, "--method", "linear,bias", "--dtype", "fp32", "--gib", "0.002"]
    value = json.loads(output_of([*asked, "--json", "--card", "H100"], capsys))
    assert (value["card"], value["batch"], value["limit_bytes"]) == ("H100", 16, 2147483)
    assert value["too_large"] == []
    times = [way["modelled_step_ms"] for way in value["ways"]]
    assert times == sorted(times)
    for way in value["ways"]:
        assert way["peak_bytes"] <= value["limit_bytes"]
        assert way["micro_batch"] * way["parts"] >= 16
    text = output_of([*asked, "-o", str(picture)], capsys)
    assert picture.stat().st_size > 10_000
    for word in (
        "linear",
        "bias",
        "of 16",
        "by its figures",
        "finetune -m vit_tiny_patch16_224 --model-arg img_size=16",
        str(picture),
    ):
        assert word in text
    assert (
        max(
            len(line)
            for line in text.splitlines()
            if "finetune" not in line and str(tmp_path) not in line
        )
        <= 80
    )


def test_weights_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    deep = [*FIT, "--model-arg", "depth=4", "--method", "bias", "--dtype", "fp32", "--json"]
    asked = [*deep, "--gib", "1", "--card", "H100", "--offload", "frozen"]
    [away] = json.loads(output_of(asked, capsys))["ways"]
    assert away["options"] == ["--offload", "frozen"]
    weights = 4 * 4 * (3 * 24**2 + 24**2 + 2 * 24 * 96)  # bytes; fetched in both directions
    assert away["modelled_step_ms"] >= round(1e3 * 2 * weights * 3 / 4 / 25e9, 2)


def test_finetune_takes_the_command_that_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    # built for 224 pixels: finetune takes no other size of it unless it builds it so
    pairs = [word for word in MODEL[2:] if word != "--model-arg" and "img_size" not in word]
    model = [*MODEL[:2], *(word for pair in pairs for word in ("--model-arg", pair))]
    asked = ["--method", "spt-lora", "--budget", "900", "--rank", "1", "--image-size", "16"]
    batch = ["--batch", "8", "--dtype", "fp32", "--gib", "1", "--reserve", "0"]
    text = output_of(["fit", *model, *asked, *batch, "--num-classes", "5", "-q"], capsys)
    [line] = [line for line in text.splitlines() if "spt-kernels finetune" in line]
    program, *words, dots = shlex.split(line)
    assert (program, dots) == ("spt-kernels", "…")
    write_task(tmp_path / "data")
    write_weights(tmp_path / "base.safetensors")
    place = ["-d", str(tmp_path / "data"), "-o", str(tmp_path / "run")]
    more = ["-w", str(tmp_path / "base.safetensors"), "--epochs", "1", "-q"]
    assert run([*words, *place, *more]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preprocessing"]["size"] == 16
    method = config["job"]["method"]
    assert (method["name"], method["budget"], method["rank"]) == ("spt-lora", 900, 1)


def test_a_convnet_is_not_built_for_a_size() -> None:
    options = _besides(ModelSource("test_convnext"), FittingOptions(image_size=32))
    assert options == ["--image-size", "32"]


def test_what_does_not_fit_tells_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*FIT, "--gib", "0.00005", "--method", "linear", "--dtype", "fp32"]
    assert run(asked) == 1
    text = capsys.readouterr().out
    assert "Nothing fits" in text
    [row] = [line for line in text.splitlines() if line.startswith("linear")]
    assert row.split()[1:4] == ["fp32", "1", "of"]
    assert row.endswith("does not fit")
    assert run([*asked, "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert (value["ways"], len(value["too_large"])) == ([], 1)


def test_one_that_fits_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*FIT, "--gib", "0.0002", "--method", "linear,full", "--dtype", "fp32", "--json"]
    value = json.loads(output_of(asked, capsys))
    assert [way["method"] for way in value["ways"]] == ["linear"]
    assert [way["method"] for way in value["too_large"]] == ["full"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--gib: name the GiB of your card, as --gib 8"),
        (["--gib", "0"], "--gib: expected"),
        (
            ["--gib", "2", "--reserve", "2"],
            "2 GiB kept free (1 unless it is given) leave nothing of --gib 2",
        ),
        (["--gib", "2", "--dtype", "fp8"], "--dtype: expected of fp32, bf16-autocast, got 'fp8'"),
        (["--gib", "2", "--card", "abacus"], "--card: expected one of RTX 3060"),
        (["--gib", "2", "--method", "lorra"], "lora"),
        (["--gib", "2", "--offload", "all"], "--offload: expected frozen or forward-only for"),
        (["--gib", "2", "--offload", "state"], "--offload: 'spt-lora' has next to no state to"),
        (["--gib", "2", "-o", "ways.txt"], "--output: expected a picture"),
    ],
)
def test_what_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint_of([*FIT, *options], capsys)
