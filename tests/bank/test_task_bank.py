"""What a bank knows, refuses, and how it stands threads and damaged files."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import spt_kernels as spt

from ..models import tiny_batch, tiny_vit
from .tasks import N, check, images, loaded, plain, saved


def test_it_is_a_collection_of_names(paths: dict[str, Path]) -> None:
    bank = spt.TaskBank(plain("vit"))
    assert (len(bank), list(bank), "t0" in bank) == (0, [], False)
    for name in ("t1", "t0"):
        bank.load(name, paths[name])
    assert (len(bank), list(bank), "t0" in bank) == (2, ["t0", "t1"], True)
    assert repr(bank) == "TaskBank(VisionTransformer, tasks=2, in_memory=2, in_use=None)"
    bank.use("t0")
    with pytest.raises(ValueError, match="cannot remove 't0', which is in use"):
        bank.remove("t0")
    with pytest.raises(ValueError, match="cannot replace 't0', which is in use"):
        bank.load("t0", paths["t1"])
    bank.remove("t1")
    assert list(bank) == ["t0"]
    for call in (bank.use, bank.remove, bank.nbytes, bank.metadata):
        with pytest.raises(KeyError, match="no task 't1'; it has t0"):
            call("t1")
    assert bank.in_use == "t0"


def test_a_name_takes_another_task(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"))
    bank.load("t0", paths["t1"])
    bank.load("t0", paths["t0"])
    check(bank, "t0", outputs)


def test_metadata_is_that_of_the_file(tmp_path: Path) -> None:
    tuned = loaded("vit", saved(tmp_path, "vit", "lora", 1))
    said = {"classes": ["a", "b", "c", "d", "e"], "note": 1}
    spt.save_delta(tuned, tmp_path / "t", metadata=said)
    bank = spt.TaskBank(plain("vit"))
    bank.load("t", tmp_path / "t")
    assert bank.metadata("t") == said


def test_tasks_of_another_base_are_refused(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    bank = spt.TaskBank(plain("vit"))
    bank.load("t0", paths["t0"])
    other = plain("vit")
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight[0, 0] += 1e-3  # type: ignore[index, union-attr]
    stranger = spt.TaskBank(other)
    with pytest.raises(spt.BaseModelMismatch, match=r"blocks\.0\.attn\.qkv\.weight: the weights"):
        stranger.load("t0", paths["t0"])
    with pytest.raises(spt.BaseModelMismatch, match="tuned model: made for another base model"):
        stranger.add("t0", loaded("vit", paths["t0"]))
    with pytest.raises(spt.BaseModelMismatch, match="expected shape"):
        spt.TaskBank(tiny_vit(width=36)).load("t0", paths["t0"])
    assert len(stranger) == 0
    # a task in use must not make another of the same base a stranger
    bank.use("t0")
    bank.load("t3", paths["t3"])
    check(bank, "t3", outputs)
    check(bank, "t0", outputs)


def test_base_values_under_a_task_in_use_are_the_bases(paths: dict[str, Path]) -> None:
    model = plain("vit")
    before = {name: p.clone() for name, p in model.named_parameters()}
    bank = spt.TaskBank(model)
    bank.load("t0", paths["t0"])
    bank.use("t0")
    bank.load("t3", paths["t3"])  # at positions of which t0 has some
    for name in ("t3", None):
        bank.use(name)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_damaged_file_is_not_taken_in(paths: dict[str, Path]) -> None:
    bank = spt.TaskBank(plain("vit"))
    paths["t0"].write_bytes(paths["t0"].read_bytes()[:-1])
    with pytest.raises(spt.DeltaFormatError, match=paths["t0"].name):
        bank.load("t0", paths["t0"])
    with pytest.raises(spt.DeltaFormatError, match=paths["t0"].name):
        bank.load_in_background("t0", paths["t0"]).result(timeout=60)
    assert len(bank) == 0


def test_tasks_load_in_the_background_while_requests_are_served(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"))
    bank.load("t0", paths["t0"])
    waiting = [bank.load_in_background(name, paths[name]) for name in list(paths)[1:]]
    while not all(future.done() for future in waiting):
        check(bank, "t0", outputs)
    for future in waiting:
        future.result()
    for name in paths:
        check(bank, name, outputs)


def test_threads_never_mix_tasks(paths: dict[str, Path], outputs: dict[str, torch.Tensor]) -> None:
    bank = spt.TaskBank(plain("vit"), max_tasks=3)
    for name, path in paths.items():
        bank.load(name, path)
    x, names = images("vit", 2), list(paths)
    start = threading.Barrier(4)

    def serve(n: int) -> None:
        start.wait()
        for i in range(12):
            name, other = names[(n + i) % N], names[(n * i) % N]
            if i % 3 == 0:
                found = bank.run(x, [name, other], together=True if i else None)
                assert isinstance(found, torch.Tensor)
                expected = torch.stack([outputs[name][0], outputs[other][1]])
            else:
                with bank.using(name) as model, torch.no_grad():
                    found = model(x)
                expected = outputs[name]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(serve, n) for n in range(4)]:
            future.result(timeout=120)
    assert bank.in_use is None


def test_using_returns_to_what_was_in_use(
    paths: dict[str, Path], outputs: dict[str, torch.Tensor]
) -> None:
    bank = spt.TaskBank(plain("vit"))
    for name, path in paths.items():
        bank.load(name, path)
    bank.use("t0")
    with contextlib.suppress(ZeroDivisionError), bank.using("t1"):
        assert bank.in_use == "t1"
        1 / 0  # noqa: B018
    assert bank.in_use == "t0"
    check(bank, "t0", outputs)


def test_a_model_changed_behind_the_bank_is_noticed(paths: dict[str, Path]) -> None:
    model = plain("vit")
    bank = spt.TaskBank(model)
    bank.load("t0", paths["t0"])
    bank.use("t0")
    with torch.no_grad():
        model.blocks[1].norm1.weight.add_(1)  # type: ignore[index, operator, union-attr]
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.weight was changed, moved or cast"):
        bank.use(None)
    model = plain("vit")
    bank = spt.TaskBank(model)
    model.bfloat16()
    with pytest.raises(ValueError, match="was changed, moved or cast behind the bank"):
        bank.load("t0", paths["t0"])


def test_a_model_tuned_behind_the_bank_is_noticed(paths: dict[str, Path]) -> None:
    model = plain("vit")
    bank = spt.TaskBank(model)
    bank.load("lora", paths["t1"])
    scores = {"blocks.0.attn.qkv.weight": torch.rand(72, 24)}
    sensitivity = spt.Sensitivity.from_tensors(scores, num_samples=1)
    spt.apply(model, spt.allocate(sensitivity, 10, None))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv was changed"):
        bank.use("lora")


@pytest.mark.parametrize("replaced", ["head", "blocks.0.attn.qkv", "blocks.1.norm1.weight"])
def test_a_module_replaced_behind_the_bank_is_noticed(
    replaced: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    model = plain("vit")
    bank = spt.TaskBank(model)
    bank.load("t0", paths["t0"])
    bank.load("other head", saved(tmp_path, "vit", "lora", 1, num_classes=7))
    for name in ("other head", "t0", "other head", None):  # the bank itself may replace the head
        bank.use(name)
    parent, _, local = replaced.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, local, copy.deepcopy(getattr(owner, local)))
    with pytest.raises(ValueError, match=rf"{re.escape(replaced)} was replaced behind the bank"):
        bank.use("t0")


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"max_tasks": 0}, ValueError, "max_tasks must be at least 1"),
        ({"max_bytes": -1}, ValueError, "max_bytes must be at least 1"),
        ({"max_bytes": 2e9}, TypeError, "max_bytes must be an int or None, got float"),
    ],
    ids=str,
)
def test_limits_that_cannot_be_are_refused(
    limits: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spt.TaskBank(nn.Linear(2, 2), **limits)


def test_models_that_are_no_plain_base_are_refused(paths: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        spt.TaskBank("vit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model is tuned, a bank takes the plain base model"):
        spt.TaskBank(loaded("vit", paths["t0"]))
    with pytest.raises(ValueError, match="give a bank the model itself"):
        spt.TaskBank(nn.DataParallel(plain("vit")))
    with pytest.raises(ValueError, match="the model is not tuned"):
        spt.TaskBank(plain("vit")).add("t", plain("vit"))
    bank = spt.TaskBank(plain("vit"))
    with pytest.raises(TypeError, match="name must be a string, got None"):
        bank.load(None, paths["t0"])  # type: ignore[arg-type]
    bank.load("lora", paths["t1"])
    with pytest.raises(ValueError, match="cannot give a bank the model while a TaskBank has a tas"):
        spt.TaskBank(bank.use("lora"))
    spt.TaskBank(bank.use(None))


def test_a_model_with_a_task_on_is_no_base_of_another(paths: dict[str, Path]) -> None:
    bank = spt.TaskBank(plain("vit"))
    bank.load("lora", paths["t1"])
    plan = loaded("vit", paths["t0"]).spt_tuning.plan  # type: ignore[union-attr]
    for model in (bank.use("lora"), copy.deepcopy(bank.model)):
        with pytest.raises(ValueError, match="cannot apply the plan to the model while a TaskBan"):
            spt.apply(model, plan)
        with pytest.raises(ValueError, match="cannot measure the model while a TaskBank has a tas"):
            spt.measure_sensitivity(model, [tiny_batch()], num_samples=4)


def test_weights_of_64_bits_are_refused(tmp_path: Path) -> None:
    model = plain("vit").double()
    tuned = spt.apply(plain("vit").double(), loaded_plan(tmp_path))
    with pytest.raises(TypeError, match=r"bfloat16 or float16, got torch\.float64"):
        spt.TaskBank(model).add("t", tuned)


def loaded_plan(folder: Path) -> spt.Plan:
    tuned = loaded("vit", saved(folder, "vit", "unstructured", 0))
    plan: spt.Plan = tuned.spt_tuning.plan  # type: ignore[assignment, union-attr]
    return plan
