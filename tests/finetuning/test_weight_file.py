"""Files of weights as people have them, and files that are none: each called what it is."""

from __future__ import annotations

import argparse
import collections
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spt_kernels.files import checked_file
from spt_kernels.finetuning.base.weight_file import is_array_file, read_state_dicts

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


class Foreign:
    """What a training script pickles beside its weights."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_groups_are_found_wherever_a_training_script_puts_them(
    tmp_path: Path, zipped: bool
) -> None:
    checkpoint = {
        "epoch": 3,
        "arch": "vit",
        "args": argparse.Namespace(lr=0.1, opt="adamw"),
        "best": np.float64(81.5),
        "count": np.int64(7),
        "state_dict": collections.OrderedDict(STATE),
        "state_dict_ema": STATE,
        "nested": {"model": {"encoder": STATE}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    }
    path = tmp_path / "last.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    groups = read_state_dicts(path)
    assert list(groups) == ["state_dict", "state_dict_ema", "nested.model.encoder"]
    for tensors in groups.values():
        assert tensors.keys() == STATE.keys()
        assert torch.equal(tensors["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pt", "no-suffix"])
def test_a_file_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    for write in (lambda p: save_file(STATE, p), lambda p: torch.save(STATE, p)):
        write(tmp_path / name)
        assert read_state_dicts(tmp_path / name)[""].keys() == STATE.keys()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_could_run_code_is_told_whole(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": STATE, "x": Foreign()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"Foreign.*weights_only=False.*name that file$") as caught:
        read_state_dicts(path)
    assert "\n" not in str(caught.value)


FILES = {
    "empty": (b"", "empty"),
    "text": (b"some notes\n", "a text file; expected a state dict"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "index": (b'{"metadata": {}, "weight_map": {}}', "JSON text"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "zipped": (b"\x1f\x8b\x08" + bytes(64), "gzip-compressed"),
    "noise": (bytes(range(256)), "no file of weights"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_other_files_are_called_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("w.pth", "w"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_state_dicts(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / name} is ")


def test_a_cut_file_is_said_to_be_cut(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pth", "old.pth"):
        whole = (tmp_path / name).read_bytes()
        for kept in (len(whole) // 3, len(whole) - 4):
            (tmp_path / name).write_bytes(whole[:kept])
            with pytest.raises(ValueError, match="cut or damaged") as caught:
                read_state_dicts(tmp_path / name)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("task", "is a task file.*name the weights that it was trained on"),
        ("plan", "is a plan file, not weights"),
        ("trained", "is what a run trained, not weights"),
    ],
)
def test_files_of_this_package_are_no_weights(tmp_path: Path, kind: str, message: str) -> None:
    checked_file.write(tmp_path / "x.safetensors", kind, {}, STATE)
    with pytest.raises(ValueError, match=message):
        read_state_dicts(tmp_path / "x.safetensors")


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_state_dicts(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is a folder; name the file in it"):
        read_state_dicts(tmp_path)
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dicts(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("w.pth", b"x")
    with pytest.raises(ValueError, match="is a zip archive; unpack it"):
        read_state_dicts(tmp_path / "w.zip")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:  # as torch.jit.save does
        archive.writestr("program/constants.pkl", b"x")
        archive.writestr("program/data.pkl", b"x")
    with pytest.raises(ValueError, match="TorchScript"):
        read_state_dicts(tmp_path / "program.pt")


def test_arrays_of_numpy_are_told_from_what_torch_saved(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    torch.save(STATE, tmp_path / "w.pth")
    assert is_array_file(tmp_path / "w.npz")
    assert not is_array_file(tmp_path / "w.pth")
