"""Which tasks are in memory: limits, what is dropped, and read again from files."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.bank.banked_task import BankedTask

from ..models import tiny_vit
from .tasks import N, check, images, loaded, plain


def test_the_least_recently_used_is_dropped_and_comes_back(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"), max_tasks=2)
    for name, path in paths.items():
        bank.load(name, path)
    assert bank.in_memory == ["t2", "t3"]
    assert (len(bank), bank.nbytes("t0")) == (N, 0)
    check(bank, "t2", outputs)
    check(bank, "t0", outputs)
    assert bank.in_memory == ["t2", "t0"]
    # the task in use stays, whatever else is used
    found = bank.run(images("vit", 2), ["t1", "t3"], together=True)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found[0], outputs["t1"][0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found[1], outputs["t3"][1], rtol=1e-4, atol=2e-5)
    assert bank.in_memory == ["t0", "t3"]


def test_bytes_are_limited(paths: dict[str, Path], outputs: dict[str, torch.Tensor]) -> None:
    sizes = spt.TaskBank(plain("vit"))
    for name, path in paths.items():
        sizes.load(name, path)
    assert sizes.nbytes() > sum(sizes.nbytes(name) for name in paths)  # base values besides
    limit = sizes.nbytes("t1") + sizes.nbytes("t2")
    bank = spt.TaskBank(plain("vit"), max_bytes=limit)
    for name, path in paths.items():
        bank.load(name, path)
        assert sum(map(bank.nbytes, bank)) <= limit
    for name in paths:
        check(bank, name, outputs)
    tiny = spt.TaskBank(plain("vit"), max_bytes=1)
    tiny.load("t0", paths["t0"])
    check(tiny, "t0", outputs)  # one at a time


def test_bytes_are_those_of_what_is_in_memory(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = spt.TaskBank(plain("vit"), max_bytes=2**30)
    for name in ("t0", "t1", "t3", "t1", "t0"):  # some take the place of themselves
        bank.load(name, paths[name])
    bank.load("another t0", paths["t0"])  # of the same positions
    bank.remove("t3")
    bank.remove("t0")
    fresh = spt.TaskBank(plain("vit"))
    for name in ("t1", "t0"):
        fresh.load(name, paths[name])
    assert bank.nbytes() == fresh.nbytes()

    def counted(_: object) -> None:
        raise AssertionError("a switch goes through all that is in memory")

    monkeypatch.setattr(BankedTask, "tensors", counted)
    for name in ("t1", "another t0", None):
        bank.use(name)
    bank.run(images("vit", 2), ["t1", None])


def test_a_file_is_found_again_from_another_folder(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = spt.TaskBank(plain("vit"), max_tasks=1)
    monkeypatch.chdir(paths["t0"].parent)
    for name in ("t0", "t1"):
        bank.load(name, paths[name].name)
    monkeypatch.chdir("/")
    check(bank, "t0", outputs)


def test_what_came_from_a_model_is_never_dropped(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"), max_tasks=1)
    bank.add("t1", loaded("vit", paths["t1"]))
    bank.load("t0", paths["t0"])
    check(bank, "t0", outputs)
    bank.use(None)
    assert "t1" in bank.in_memory
    check(bank, "t1", outputs)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another base"])
def test_a_file_damaged_after_its_task_was_dropped(
    damage: str, paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"), max_tasks=1)
    bank.load("t0", paths["t0"])
    bank.load("t1", paths["t1"])
    check(bank, "t1", outputs)
    content = bytearray(paths["t0"].read_bytes())
    error: type[Exception] = spt.DeltaFormatError
    if damage == "flipped":
        content[-9] ^= 4
        paths["t0"].write_bytes(content)
    elif damage == "cut":
        paths["t0"].write_bytes(content[:-100])
    elif damage == "gone":
        paths["t0"].unlink()
        error = FileNotFoundError
    else:
        other = tiny_vit(seed=5)
        spt.apply(other, loaded("vit", paths["t1"]).spt_tuning.plan)  # type: ignore[union-attr]
        spt.save_delta(other, paths["t0"])
        error = spt.BaseModelMismatch
    for call in (
        lambda: bank.use("t0"),
        lambda: bank.run(images("vit", 2), ["t1", "t0"], together=True),
        lambda: bank.run(images("vit", 2), ["t0", "t1"], together=False),
    ):
        with pytest.raises(error, match=paths["t0"].name):
            call()
        assert bank.in_use == "t1"
        with torch.no_grad():
            torch.testing.assert_close(
                bank.model(images("vit", 2)), outputs["t1"], rtol=1e-4, atol=2e-5
            )
    paths["t0"].write_bytes(content if damage != "flipped" else _unflipped(content))
    check(bank, "t0", outputs)


def _unflipped(content: bytearray) -> bytes:
    content[-9] ^= 4
    return bytes(content)


def test_what_using_returns_to_stays(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"), max_tasks=1)
    for name, path in paths.items():
        bank.load(name, path)
    bank.use("t0")
    with bank.using("t1"), bank.using("t2"):
        paths["t0"].write_bytes(b"damaged")
        bank.use("t3")
        assert bank.in_memory == ["t0", "t1", "t3"]
        with pytest.raises(ValueError, match="cannot remove 't1', which is in use"):
            bank.remove("t1")
        with pytest.raises(ValueError, match="cannot replace 't0', which is in use"):
            bank.load("t0", paths["t1"])
    assert (bank.in_use, bank.in_memory) == ("t0", ["t0"])
    check(bank, "t0", outputs)


def test_memory_is_flat_over_a_thousand_switches(paths: dict[str, Path]) -> None:
    bank = spt.TaskBank(plain("vit"))
    for name in ("t0", "t1", "t3"):
        bank.load(name, paths[name])
    names = [*bank, None]

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        tensors = [o for o in objects if type(o) in (torch.Tensor, nn.Parameter)]
        return len(objects), sum(tensor.nbytes for tensor in tensors)

    counts = []
    for times in (8, 1000):
        for i in range(times):
            bank.use(names[i % len(names)])
        counts.append(alive())
    assert counts[1][1] <= counts[0][1]  # what other tests have left may go meanwhile
    assert counts[1][0] - counts[0][0] < 100
