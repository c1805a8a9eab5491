"""What `finetune`, `sensitivity` and `plan` do with their options: checked first, none ignored."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from spt_kernels.cli.app import run
from spt_kernels.cli.terminal import Bars
from spt_kernels.cli.training_options import MethodOptions, RecipeOptions, parse_budget
from spt_kernels.finetuning import Recipe
from spt_kernels.finetuning.job.presets import preset_of
from spt_kernels.methods import Method
from spt_kernels.methods.noah_architecture import NoahArchitecture
from spt_kernels.plan import Plan
from tests.finetuning.pictures_on_disk import TINY, write_task, write_weights
from tests.finetuning.undrawn import draw_nothing

SHAPE = [part for key, value in TINY.items() for part in ("--model-arg", f"{key}={value}")]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_task(folder / "data")
    write_weights(folder / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def job(place: Path) -> list[str]:
    weights = ["-w", str(place / "base.safetensors"), "-d", str(place / "data")]
    return ["-m", "vit_tiny_patch16_224", *SHAPE, *weights]


@pytest.fixture(scope="module")
def measured(place: Path, job: list[str]) -> Path:
    file = place / "measured.safetensors"
    assert run(["sensitivity", *job, "-o", str(file), "--samples", "9", "-q", "--json"]) == 0
    return file


def complaint_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1, streams.err
    return streams.err


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "longer", "option"),
    [
        ("finetune", "--epochs, --micro-batch, --recompute, --memory, --offload", "--patience"),
        ("segment", "--iterations, --recompute", "--rank"),
    ],
)
def test_a_part_of_the_job_is_not_resumed(
    command: str, longer: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = longer.partition(",")[0]
    arguments = [command, "--resume", "-o", str(tmp_path), option, "3", allowed, "9"]
    message = f"--resume: beside it expected {longer} alone, or the whole job from --model on"
    assert message in complaint_of(arguments, capsys)


MISTAKES = {
    "other classes": (["--model-arg", "num_classes=9"], "num_classes=9 is not the number of"),
    "features": (["--model-arg", "features_only=True"], "a score per class, not features"),
    "no pooling": (["--model-arg", "global_pool="], "is to give one score per class, 1 × 3, and"),
    "text for a number": (["--model-arg", "depth=six"], "cannot be built with depth='six'"),
    "unknown argument": (["--model-arg", "deep=3"], "cannot be built with deep=3"),
    "one mean": (
        ["--mean", "0.5", "--std", "0.5"],
        "--mean, --std: this model takes images of 3 channels",
    ),
    "two means": (["--mean", "0.5,0.5", "--std", "1,1,1"], "--mean, --std: expected 3 values"),
    "image size": (["--image-size", "64"], "another size with --model-arg img_size=64"),
    "workers": (["--workers", "-1"], "--workers: expected 0 or more processes, got -1"),
}
OF_FINETUNE = {
    "checkpoints": (["--checkpoint-every", "-1"], "--checkpoint-every: expected 0 or more"),
    "too few images": (["--train-images", "2"], "--train-images: expected at least one of each"),
    "all of it": (["--budget", "1.0"], "--budget: expected"),
    "without end": (["--budget", "inf"], "--budget: expected"),
    "too large": (["--budget", "1M"], "budget=1,000,000 is more than can be spent"),
    "too small": (
        ["--method", "spt-lora-structured", "-b", "20"],
        "the smallest LoRA of rank 8 costs 384, got 20: a larger budget or a smaller rank",
    ),
    "no plan": (["--plan", "{x}.plan"], "plan: no such file"),
    "no sensitivity": (["--sensitivity", "{x}.s"], "sensitivity: no such file"),
    "no architecture": (
        ["--method", "noah", "--architecture", "{x}.json"],
        "--architecture: no such file",
    ),
    "a search by nothing": (
        ["--method", "noah", "--val-share", "0"],
        "--val-share: method 'noah' searches by validation images, and there are none",
    ),
    "no one to look at": (
        ["--val-share", "0", "--val-every", "2"],
        "--val-every: there are no validation images to look at; give some, or hold out a share",
    ),
    "no such block": (["--from-block", "9"], "from-block: expected a block from 0 (blocks.0) to 1"),
    "no block": (["--method", "linear", "--from-block", "1"], "--from-block: method 'linear' has"),
    "no search": (["--generations", "3"], "--generations: method 'spt-lora' has none; leave it"),
}


@pytest.mark.parametrize("command", ["finetune", "sensitivity"])
@pytest.mark.parametrize("name", [*MISTAKES, *OF_FINETUNE])
def test_options_are_checked_before_the_work(
    name: str, command: str, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "sensitivity" and name in OF_FINETUNE:
        return
    options, words = {**MISTAKES, **OF_FINETUNE}[name]
    output = tmp_path / "x"
    given = [option.format(x=output) for option in options]
    assert words in complaint_of([command, *job, *given, "-o", str(output)], capsys)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("400000", 400_000),
        ("0.4M", 400_000),
        ("1k", 1000),
        ("1", 1),
        ("0.005", 0.005),
        ("1%", 0.01),
    ],
)
def test_a_budget_is_a_number_or_a_share(text: str, value: float) -> None:
    assert parse_budget(text) == value
    assert type(parse_budget(text)) is type(value)


@pytest.mark.parametrize("text", ["1.0", "2.5", "100%", "inf", "nan", "0", "-1", "1.5k%", ""])
def test_a_budget_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--budget: expected"):
        parse_budget(text)


def test_an_architecture_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "architecture.json"
    file.write_text('{"prompts": [1, 0], "adapters": [0, 2], "loras": [3, 3], "parameters": 9}')
    chosen = MethodOptions("noah", architecture=file).chosen(preset_of("paper"))
    assert chosen == Method("noah", architecture=NoahArchitecture((1, 0), (0, 2), (3, 3)))


def test_files_are_overwritten_by_force_alone(
    measured: Path, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, picture = tmp_path / "a.plan", tmp_path / "a.png"
    arguments = ["plan", str(measured), "-b", "300", "-o", str(plan), "--picture", str(picture)]
    assert json_of(arguments, capsys)["written"] == [str(plan), str(picture)]
    before = plan.read_bytes()
    again = [*arguments, "--rule", "published-code"]
    assert f"--output: {plan} is there already; --force" in complaint_of(again, capsys)
    plan.unlink()
    assert f"--picture: {picture} is there already" in complaint_of(again, capsys)
    assert not plan.exists()
    plan.write_bytes(before)
    assert run([*again, "--force"]) == 0
    text = capsys.readouterr().out
    assert f"written to {plan}" in text
    assert f"written to {picture}" in text
    assert plan.read_bytes() != before
    onto_itself = ["plan", str(measured), "-o", str(measured), "--force"]
    assert "is the sensitivity as well" in complaint_of(onto_itself, capsys)
    text_file = ["plan", str(measured), "--picture", str(tmp_path / "a.txt")]
    assert "--picture: expected a picture" in complaint_of(text_file, capsys)
    nowhere = ["plan", str(measured), "-o", str(tmp_path / "no" / "a.plan")]
    assert "--output: no such folder" in complaint_of(nowhere, capsys)

    before = measured.read_bytes()
    arguments = ["sensitivity", *job, "-o", str(measured), "--samples", "8", "-q"]
    assert "is there already" in complaint_of(arguments, capsys)
    assert measured.read_bytes() == before
    assert "expected a file, got the folder" in complaint_of(
        ["sensitivity", *job, "-o", str(tmp_path)], capsys
    )
    memory = ["memory", *job[:-4], "--method", "linear", "--batch", "1", "-o", str(picture)]
    assert "is there already; --force" in complaint_of(memory, capsys)


def test_what_a_command_reads_is_never_overwritten(
    place: Path, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "run", tmp_path / "base.safetensors"
    shutil.copy(place / "base.safetensors", base)
    own = [str(base) if part.endswith("base.safetensors") else part for part in job]
    train = ["finetune", *own, "--method", "linear", "--epochs", "1", "-q", "-o", str(folder)]
    assert run([*train, "--json"]) == 0
    before = {path: path.read_bytes() for path in (folder / "task.safetensors", base)}
    (tmp_path / "link.safetensors").symlink_to(base)
    for output, what in (
        (folder / "task.safetensors", "task"),
        (base, "base weights"),
        (tmp_path / "link.safetensors", "base weights"),
    ):
        merge = ["merge", str(folder), "-o", str(output), "--force"]
        assert f"--output: {output} is the {what}, which is read" in complaint_of(merge, capsys)
    measure = ["sensitivity", *own, "-o", str(base), "--force"]
    assert f"--output: {base} is the base weights" in complaint_of(measure, capsys)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that nobody writes to")
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sensitivity", *job, "-o", "/proc/a.sensitivity"]
    assert "--output: cannot write to /proc (" in complaint_of(arguments, capsys)


def test_a_plan_decides_in_every_command(
    measured: Path, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapter.plan"
    make = ["plan", str(measured), "-b", "400", "--structured", "adapter", "--rank", "2"]
    make += ["--from-block", "blocks.1"]
    assert run([*make, "-o", str(file)]) == 0
    finetune = ["finetune", *job, "--plan", str(file), "--epochs", "1", "-q", "-o"]
    for number, (options, words) in enumerate(
        (
            (["--method", "spt-lora"], "plan: expected one of method 'spt-lora', got adapter"),
            (["--rank", "8"], "rank: the plan decides, and has 2, got 8"),
            (["--budget", "0.5%"], "budget: the plan decides, and has 400, got 0.005"),
            (["--samples", "800"], "samples: the plan decides, and has 9, got 800"),
            (["--rule", "published-code"], "rule: the plan decides, and has paper"),
            (["--from-block", "0"], "from-block: the plan decides, and has blocks.1, got 0"),
        )
    ):
        assert words in complaint_of([*finetune, str(tmp_path / f"{number}"), *options], capsys)
    same = ["--rank", "2", "--budget", "400", "--samples", "9", "--rule", "paper"]
    same += ["--from-block", "1"]
    value = json_of([*finetune, str(tmp_path / "run"), *same], capsys)
    assert (value["method"], value["budget"]) == ("spt-adapter", 400)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["job"]["method"]["name"] == "spt-adapter"
    assert config["job"]["method"]["rank"] == 2
    assert config["job"]["method"]["from_block"] == "blocks.1"
    assert Plan.load(tmp_path / "run" / "plan.safetensors") == Plan.load(file)

    memory = ["memory", *job[:-4], "--plan", str(file), "--method", "spt-adapter", "--batch", "2"]
    accounted = json_of([*memory, "-b", "400", "--rank", "2"], capsys)["methods"]
    assert [*accounted] == ["spt-adapter"]
    assert "has 2, got 4" in complaint_of([*memory, "--rank", "4"], capsys)
    of_another = [*memory[:-4], "--method", "lora"]
    assert "expected one of method 'lora'" in complaint_of(of_another, capsys)

    given = ["finetune", *job, "--sensitivity", str(measured), "--samples", "800"]
    assert "samples: the sensitivity was measured on 9, got 800" in complaint_of(
        [*given, "-o", str(tmp_path / "no")], capsys
    )
    none = ["plan", str(measured), "--structured", "none", "--rank", "4"]
    assert "--rank: --structured none puts no module" in complaint_of(none, capsys)
    assert "--structured: expected one of" in complaint_of(
        ["plan", str(measured), "--structured", "prompt"], capsys
    )


def test_a_bare_resume_makes_a_run_longer(
    place: Path, job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "longer"
    arguments = ["finetune", *job, "--method", "linear", "--epochs", "1", "-o", str(folder)]
    first = json_of([*arguments, "-q"], capsys)
    resume = ["finetune", "--resume", "-o", str(folder), "--epochs"]
    value = json_of([*resume, "3", "-q"], capsys)
    assert (first["epochs"], value["epochs"]) == (1, 3)
    assert sorted(value["written"]) == sorted(p.name for p in folder.iterdir())
    assert "epochs was 3, is 2" in complaint_of([*resume, "2"], capsys)


def test_all_that_saves_memory_together(
    place: Path,
    job: list[str],
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_nothing(monkeypatch)
    folder, merged = place / "small", place / "small.safetensors"
    less = ["--approximate", "gelu-2bit,layer-norm-from-output", "--from-block", "1"]
    less += ["--memory", "64MiB", "--amp", "bf16", "--offload", "frozen"]
    what = ["--budget", "600", "--rank", "1", "--sensitivity", str(measured)]
    arguments = ["finetune", *job, *what, *less, "--epochs", "1", "-o", str(folder), "-q"]
    first = json_of(arguments, capsys)
    assert (first["micro_batch"], first["offload"]) == (None, "frozen")
    resume = ["finetune", "--resume", "-o", str(folder), "--epochs", "2", "-q"]
    result = json_of([*resume, "--micro-batch", "3", "--offload", "nothing"], capsys)
    assert (result["epochs"], result["micro_batch"], result["offload"]) == (2, 3, None)
    file = folder / "task.safetensors"
    shown = json_of(["inspect", str(file)], capsys)
    assert "blocks.1" in json.dumps(shown)
    assert "blocks.0" not in json.dumps(shown), "nothing is tuned there"
    found = json_of(["evaluate", str(folder), "-q"], capsys)
    assert found["accuracy"] == pytest.approx(result["test_accuracy"])
    assert run(["merge", str(folder), "-o", str(merged), "-q"]) == 0
    data = ["-d", str(place / "data")]
    assert json_of(["evaluate", str(merged), *data, "-q"], capsys)["accuracy"] == found["accuracy"]


def test_a_bare_resume_goes_on_in_another_memory() -> None:
    parts = Recipe(epochs=3, micro_batch=8, recompute="mlp")
    for given, expected in (
        ({"micro_batch": 4}, {"micro_batch": 4}),
        ({"recompute": "nothing", "epochs": 5}, {"recompute": "nothing", "epochs": 5}),
        ({"memory_bytes": "2GiB"}, {"micro_batch": None, "recompute": None, "memory_bytes": 2**31}),
    ):
        assert RecipeOptions(**given).resumed(parts) == replace(parts, **expected)
    memory = Recipe(memory_bytes=2**33)
    assert RecipeOptions(micro_batch=4).resumed(memory) == Recipe(micro_batch=4)
    assert RecipeOptions().resumed(memory) == memory


def test_every_epoch_has_a_line_on_stderr_and_in_the_log(
    place: Path, job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "lines"
    arguments = ["finetune", *job, "--method", "lora", "--epochs", "2", "--batch-size", "64"]
    assert run([*arguments, "-o", str(folder)]) == 0
    streams = capsys.readouterr()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for row in rows:
        line = (
            f"epoch {row['epoch']}/2 · loss {row['train_loss']:.4f} · val loss "
            f"{row['val_loss']:.4f} · val accuracy {100 * row['val_accuracy']:.1f} % · "
            f"lr {row['lr']:.2e} · "
        )
        assert line in streams.err
        assert line in (folder / "log.txt").read_text()
    assert "lora trains " in streams.err
    assert (
        " % of the backbone; LoRA of rank 8 on 4 matrices; and the head, head, of " in streams.err
    )
    assert "a batch of 64 is more than the 33 training images" in streams.err
    for name in ("log.txt", "metrics.jsonl", "state.pt"):
        assert name in streams.out, "everything written is named"


def test_a_terminal_keeps_what_is_said() -> None:
    written = io.StringIO()
    with Bars(Console(file=written, force_terminal=True, width=100, highlight=False)) as bars:
        bars.start("training", 2)
        bars.advance(2, "epoch 1/1")
        bars.say("epoch 1/1 · loss 0.5")
    assert "epoch 1/1 · loss 0.5" in written.getvalue()


def test_a_rank_for_which_nothing_is_structured_is_told(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(measured), "-b", "300", "--rank", "20"]) == 0
    assert "no matrix reaches what LoRA of rank 20 costs" in capsys.readouterr().out


def test_a_recipe_sets_what_is_not_given_and_is_recorded_by_name(
    tmp_path: Path, job: list[str]
) -> None:
    given = ["--epochs", "1", "--batch-size", "8", "--std", "0.5,0.5,0.5", "--samples", "9"]
    command = ["finetune", *job, "--recipe", "published-code-fgvc", *given, "-o", str(tmp_path)]
    assert run([*command, "-q", "--json"]) == 0
    written = json.loads((tmp_path / "config.json").read_text())["job"]
    recipe, method, form = written["recipe"], written["method"], written["form"]
    assert (recipe["preset"], recipe["schedule"]) == ("published-code-fgvc", "epoch")
    assert (recipe["epochs"], recipe["batch_size"], recipe["weight_decay"]) == (1, 8, 1e-4)
    assert (method["samples"], method["rule"]) == (9, "published-code")
    assert (form["mean"], form["std"]) == ([0.485, 0.456, 0.406], [0.5, 0.5, 0.5])
    assert (form["augment"], form["crop_pct"]) == ("random-crop-flip", 0.875)


def test_a_measured_sensitivity_goes_before_the_samples_of_a_recipe(
    tmp_path: Path, job: list[str], measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", *job, "--sensitivity", str(measured), "-o", str(tmp_path / "run")]
    recipe = ["--recipe", "published-code", "--epochs", "1", "--batch-size", "12"]
    assert run([*command, *recipe, "-q"]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())["job"]["method"]
    assert (written["samples"], written["rule"]) == (9, "published-code")
    assert "--recipe: expected one of paper" in complaint_of([*command, "--recipe", "x"], capsys)
    assert "--layout: expected one of cub" in complaint_of([*command, "--layout", "x"], capsys)
