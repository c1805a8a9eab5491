"""`spt-kernels inspect -m`: what is tunable in an architecture."""

from __future__ import annotations

import pytest

from tests.cli.test_commands import complaint_of, json_of, output_of

TINY = ["-m", "convnext_atto", "--model-arg", "depths=[1,1,1,1]", "--model-arg", "dims=[8,8,8,8]"]


def test_the_table_and_the_json_agree(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", *TINY, "--image-size", "64"]
    value = json_of(arguments, capsys)
    assert value["image_shape"] == [3, 64, 64]
    assert value["parameters"] == sum(share["numel"] for share in value["shares"])
    assert 0 < value["tunable"] < value["parameters"]
    kinds = {share["kind"]: share for share in value["shares"]}
    assert kinds["1×1 convolution"]["takes"] == "LoRA, Adapter, entries"
    assert kinds["other convolution"]["takes"] == "entries"
    text = output_of(arguments, capsys)
    for share in value["shares"]:
        assert f"{share['numel']:,}" in text
        assert share["kind"] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a file or folder, or a --model"),
        (["some.safetensors", "-m", "resnet18"], "name a file or folder, or a --model"),
        (["some.safetensors", "--image-size", "64"], "--image-size: goes with --model"),
        (["-m", "no_such_model"], "no_such_model"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint_of(["inspect", *arguments], capsys)
