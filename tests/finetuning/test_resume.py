"""Runs that are killed, fail to start, or are made longer, and what of them is used again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, SavedRun
from spt_kernels.finetuning import finetune as run
from spt_kernels.finetuning.folder.checkpoint import Checkpoint
from spt_kernels.finetuning.folder.run_folder import FILES, RunFolder
from spt_kernels.finetuning.training.accuracy import evaluate
from spt_kernels.finetuning.training.run_step import RunStep
from spt_kernels.plan import Plan

from .killed import Heard, Killed

SHORT = Recipe(epochs=3, batch_size=8)
MADE = ("task.safetensors", "plan.safetensors", "sensitivity.safetensors")


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize("name", ["spt-lora", "spt-adapter", "lora-2"])
def test_wherever_a_run_is_killed_the_same_file_comes_out(
    name: str, place: Path, task: ImageSource, base: ModelSource
) -> None:
    aware = name.startswith("spt")
    method = Method(name, 1500, 1, 30) if aware else Method(name)
    job = FinetuneJob(base, task, method, SHORT)
    result = run(job, place / f"{name}-whole")
    if aware:
        assert Plan.load(place / f"{name}-whole" / "plan.safetensors").structured
    folder = place / f"{name}-killed"
    measuring = ["measuring sensitivity begins", "measuring sensitivity goes on"]
    # each of these in the run that the one before left; the first checkpoint is after epoch 1
    for at in (*(measuring * (name == "spt-lora")), f"{name} trains", "training goes on"):
        with pytest.raises(Killed):
            run(job, folder, resume=True, checkpoint_seconds=0, progress=Heard(at))
        assert not (folder / "checkpoint.pt").exists()
    for at in ("epoch 2/3", "testing goes on"):
        with pytest.raises(Killed):
            run(job, folder, resume=True, checkpoint_seconds=0, progress=Heard(at))
    assert not (folder / "result.json").exists()
    (folder / "seconds.json").write_text('{"seconds": 1000.0}')
    resumed = run(job, folder, resume=True)
    assert resumed["test_accuracy"] == result["test_accuracy"]
    assert 1000 <= resumed["seconds"] < 1000 + 600, "over all resumes"
    files = MADE if aware else (result["file"],)
    for file in files:
        assert (folder / file).read_bytes() == (place / f"{name}-whole" / file).read_bytes(), file
    ours, theirs = (
        [
            json.loads(line) | {"step_ms": 0}
            for line in (place / f"{name}-{which}" / "metrics.jsonl").open()
        ]
        for which in ("killed", "whole")
    )
    assert ours == theirs


def test_a_process_killed_before_its_first_checkpoint_resumes_to_the_same_bytes(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    recipe = replace(SHORT, epochs=6, val_every=50)
    job = FinetuneJob(base, task, Method("spt-adapter", 1500, 1, 30), recipe)
    run(job, place / "whole")
    killed = place / "killed"
    script = (
        "import json, sys, pytest, torch\n"
        "from spt_kernels.finetuning import FinetuneJob, finetune\n"
        "from tests.finetuning.killed import Ends\n"
        "from tests.finetuning.undrawn import draw_nothing\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "draw_nothing(pytest.MonkeyPatch())\n"
        "job = FinetuneJob.from_json(json.loads(sys.argv[1]))\n"
        "how = {'checkpoint_seconds': 3600, 'progress': Ends('epoch 4/')}\n"
        "finetune(job, sys.argv[2], resume=True, **how)\n"
    )
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", script, json.dumps(job.to_json()), str(killed), threads]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert len((killed / "metrics.jsonl").read_text().splitlines()) >= 3
    assert not (killed / "checkpoint.pt").exists()
    before = json.loads((killed / "seconds.json").read_text())["seconds"]
    result = run(job, killed, resume=True)
    for name in MADE:
        assert (killed / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    assert result["seconds"] > before
    assert not (killed / "seconds.json").exists()


def test_a_measured_sensitivity_is_used_by_the_next_try(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    folder = place / "next" / "try"
    # whether a LoRA of so large a rank is worth its place is known after the measuring
    refused = FinetuneJob(base, task, Method("spt-lora-structured", 300, 2, 30), SHORT)
    heard = Heard()
    with pytest.raises(ValueError, match="puts no LoRA on any matrix"):
        run(replace(refused, method=replace(refused.method, rank=3)), folder, progress=heard)
    assert "measuring sensitivity" in heard.stages
    assert {p.name for p in folder.iterdir()} == {"sensitivity.safetensors", "sensitivity.json"}
    job = replace(refused, method=Method("spt-lora", 400, 2, 30), recipe=replace(SHORT, epochs=1))
    heard = Heard()
    run(job, folder, progress=heard)  # nothing is in its way
    assert "measuring sensitivity" not in heard.stages
    assert any("measured before is used again" in line for line in heard.lines)
    run(job, place / "measured-anew")
    for name in MADE:
        assert (folder / name).read_bytes() == (place / "measured-anew" / name).read_bytes(), name

    for change in (
        {"method": replace(job.method, samples=20)},
        {"recipe": replace(job.recipe, seed=1)},
        {"form": {"fit": "crop"}},
        {"images": replace(task, classes=("red", "blue"))},
        {"model": replace(base, args={**base.args, "act_layer": "relu"})},
    ):
        heard = Heard(at="measuring sensitivity begins")
        with pytest.raises(Killed):
            run(replace(job, **change), folder, force=True, progress=heard)
    (folder / "sensitivity.safetensors").write_bytes(b"of something else")
    with pytest.raises(Killed):
        run(job, folder, force=True, progress=Heard(at="measuring sensitivity begins"))
    assert SavedRun.find(folder).load() is not None, "what is to be overwritten is still there"


def test_a_folder_that_is_half_cleared_tells_whose_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink = RunFolder(tmp_path), Path.unlink
    for file in FILES.values():
        (tmp_path / file).touch()

    def killed(path: Path, **how: bool) -> None:
        if path == folder["state"]:
            raise Killed
        unlink(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            folder.clear()
    assert folder["config"].is_file(), "another run would take the state for its own"
    folder.clear()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": Method("spt-lora", 10**9)}, "budget"),
        ({"method": Method("spt-lora-structured", 20)}, "budget"),
        ({"method": Method("lora", 1)}, "budget"),
        ({"images": {"classes": ("red", "pink")}}, "classes: 'pink'"),
        ({"images": {"train_images": 2}}, "train_images: expected at least one of each of the 3"),
        (
            {"form": {"mean": (0.5,), "std": (0.5,)}},
            "mean, std: this model takes images of 3 channels",
        ),
        ({"form": {"size": 64}}, "image_size"),
        ({"model": {"global_pool": ""}}, "model_arg: VisionTransformer is to give one score"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds: expected 0 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_job_that_cannot_be_leaves_no_folder_and_measures_nothing(
    change: dict[str, Any], words: str, tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    options = {n: change[n] for n in ("workers", "checkpoint_seconds") if n in change}
    parts = {n: value for n, value in change.items() if n not in options}
    if "images" in parts:
        parts["images"] = replace(task, **parts["images"])
    if "model" in parts:
        parts["model"] = replace(base, args={**base.args, **parts["model"]})
    job = replace(FinetuneJob(base, task, Method("spt-lora", 400, 2), SHORT), **parts)
    heard = Heard()
    with pytest.raises(ValueError, match=words):
        run(job, tmp_path / "deep" / "run", progress=heard, **options)
    assert not list(tmp_path.iterdir())
    assert heard.stages == []


def test_a_failure_before_the_first_epoch_is_over_leaves_no_folder(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, Method("lora"), replace(SHORT, lr=1e30))
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        run(job, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(replace(job, recipe=replace(SHORT, epochs=1)), tmp_path / "run")


def test_the_end_of_the_memory_before_the_first_epoch_is_over_leaves_a_run_to_go_on_with(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder, recipe = tmp_path / "run", replace(SHORT, epochs=1)
    job = FinetuneJob(base, task, Method("lora", rank=2), recipe)
    left = {}
    for place in ("open_setting", "train"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"spt_kernels.finetuning.pipeline.{place}", fail)
            with pytest.raises(torch.OutOfMemoryError):
                run(job, folder)
        left[place] = {path.name for path in folder.glob("*")}
    assert left == {"open_setting": set(), "train": {"config.json", "log.txt", "plan.safetensors"}}
    less = replace(job, recipe=replace(recipe, micro_batch=3))
    assert run(less, folder, resume=True)["micro_batch"] == 3


def test_a_finished_run_is_made_longer(place: Path, task: ImageSource, base: ModelSource) -> None:
    folder = place / "longer"
    job = FinetuneJob(base, task, Method("lora", rank=2), replace(SHORT, epochs=2))
    first = run(job, folder)
    longer = replace(job, recipe=replace(SHORT, epochs=4))
    heard = Heard()
    result = run(longer, folder, resume=True, progress=heard)
    assert (first["epochs"], result["epochs"]) == (2, 4)
    assert "going on after epoch 2 of 4" in heard.lines
    assert result["seconds"] > first["seconds"]
    rates = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").open()]
    steps = 5  # 33 images in batches of 8
    own = [1e-3 * longer.recipe.lr_factor(steps * (n + 1) - 1, steps) for n in range(4)]
    assert rates[2:] == pytest.approx(own[2:])
    assert rates[2] > rates[1], "the schedule of four epochs is higher there"
    assert run(longer, folder, resume=True) == result
    with pytest.raises(ValueError, match=r"another job \(epochs was 4, is 3\)"):
        run(replace(job, recipe=SHORT), folder, resume=True)
    (folder / "state.pt").unlink()
    with pytest.raises(ValueError, match=r"epochs: .* without its state\.pt"):
        run(replace(job, recipe=replace(SHORT, epochs=5)), folder, resume=True)
    assert run(longer, folder, resume=True) == result


def test_a_run_goes_on_in_less_memory(place: Path, task: ImageSource, base: ModelSource) -> None:
    recipe = replace(SHORT, epochs=2)
    job = FinetuneJob(base, task, Method("lora", rank=2), recipe)
    whole = run(job, place / "in-all-memory")
    killed, folder = place / "killed-at-its-end", place / "in-less-memory"
    with pytest.raises(Killed):
        run(job, killed, checkpoint_seconds=0, progress=Heard("epoch 2/2"))
    shutil.copytree(killed, folder)
    result = run(replace(job, recipe=replace(recipe, recompute="mlp,qkv")), folder, resume=True)
    assert result["recompute"] == "mlp,qkv"
    own = (place / "in-all-memory" / result["file"]).read_bytes()
    assert (folder / result["file"]).read_bytes() == own, "computed again, to the bit"
    config = json.loads((folder / "config.json").read_text())
    assert config["job"]["recipe"]["recompute"] == "mlp,qkv", "as it has gone on"

    parted = run(replace(job, recipe=replace(recipe, micro_batch=3)), killed, resume=True)
    assert parted["micro_batch"] == 3
    # LoRA's dropout draws anew for parts of a batch
    assert parted["train_loss"] == pytest.approx(whole["train_loss"], rel=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"approximate": "gelu-8bit"}},
        {"recipe": {"amp": "bf16"}},
        {"recipe": {"batch_size": 4}},
        {"method": {"from_block": 1}},
    ],
    ids=lambda change: next(iter(next(iter(change.values())))),
)
def test_what_comes_out_of_a_run_is_settled(
    change: dict[str, dict[str, Any]], task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, Method("spt-lora", 400, 2), replace(SHORT, micro_batch=2))
    [(part, values)] = change.items()
    other = replace(job, **{part: replace(getattr(job, part), **values)})
    assert (other.difference_from(job) or "").startswith(f"{next(iter(values))} was ")


def test_norms_over_a_batch_go_on_with_as_many_images(place: Path, task: ImageSource) -> None:
    folder, recipe = place / "batch-norm", Recipe(epochs=1, batch_size=11, micro_batch=4)
    job = FinetuneJob(ModelSource("test_resnet"), task, Method("full"), recipe, {"size": 32})
    run(job, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    longer = replace(recipe, epochs=2)
    with pytest.raises(
        ValueError, match=r"micro_batch: conv1\.1 takes .* were 4 .*, got 11: micro"
    ):
        run(replace(job, recipe=replace(longer, micro_batch=None)), folder, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run(replace(job, recipe=replace(longer, recompute="block")), folder, resume=True)


def test_the_first_step_of_a_longer_run_has_the_rate_of_its_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, Method("linear"), replace(SHORT, epochs=1))
    run(job, tmp_path / "run")
    rates: list[float] = []

    class Watched(RunStep):
        def __init__(self, model: Any, optimizer: Any, *args: Any) -> None:
            super().__init__(model, optimizer, *args)
            self.optimizer = optimizer

        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            rates.append(float(self.optimizer.param_groups[0]["lr"]))
            return super().__call__(images, labels)

    monkeypatch.setattr("spt_kernels.finetuning.training.loop.RunStep", Watched)
    longer = replace(job, recipe=replace(SHORT, epochs=2))
    run(longer, tmp_path / "run", resume=True)
    assert rates == pytest.approx([1e-3 * longer.recipe.lr_factor(5 + n, 5) for n in range(5)])


@pytest.mark.parametrize("name", ["spt-lora", "lora-2", "full"])
def test_the_best_epoch_by_validation_is_kept_beside_the_last(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: ImageSource, base: ModelSource
) -> None:
    accuracies = iter([0.5, 0.75, 0.25])
    losses = iter([1.0, 0.8, 0.1])

    def seen(model: Any, batches: Any, **options: Any) -> Any:
        real = evaluate(model, batches, **options)
        return replace(real, correct=int(next(accuracies) * 100), total=100, loss=next(losses))

    monkeypatch.setattr("spt_kernels.finetuning.training.loop.evaluate", seen)
    method = Method(name, 400, 2, 30) if name == "spt-lora" else Method(name)
    job = FinetuneJob(base, task, method, SHORT)
    states: list[dict[str, torch.Tensor]] = []
    take = Checkpoint.take.__func__

    def kept(cls: Any, epoch: int, *args: Any) -> Checkpoint:
        taken: Checkpoint = take(cls, epoch, *args)
        states.append({n: t.clone() for n, t in taken.tensors.items()})
        return taken

    monkeypatch.setattr(Checkpoint, "take", classmethod(kept))
    result = run(job, tmp_path / "run", checkpoint_seconds=0)
    assert (result["best_epoch"], result["best_val_accuracy"]) == (2, 0.75)
    assert result["best_file"] == f"best-{result['file']}"
    for file, epoch in ((result["best_file"], 2), (result["file"], 3)):
        model = SavedRun.find(tmp_path / "run" / file).load()
        found = dict(model.named_parameters())
        for parameter, tensor in states[epoch - 1].items():
            if parameter in found:
                assert torch.equal(found[parameter], tensor), (file, parameter)
