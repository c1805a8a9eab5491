"""Every command as a user calls it: what it prints, what it leaves, what it says to a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

import spt_kernels as spt
from spt_kernels.cli.app import run
from spt_kernels.costs import CostSetting, table7
from spt_kernels.costs.measure import measure_row
from spt_kernels.costs.sensitivity_speed import measure_sensitivity_speed
from spt_kernels.costs.worker import SENSITIVITY
from spt_kernels.sensitivity import skewed_sensitivity
from tests.finetuning.pictures_on_disk import TINY, write_images, write_task, write_weights
from tests.models import tiny_vit
from tests.quantized import quantize

SHAPE = [part for key, value in TINY.items() for part in ("--model-arg", f"{key}={value}")]
COMMANDS = (
    *("demo", "finetune", "segment", "sensitivity", "plan", "memory", "inspect", "evaluate"),
    *("predict", "compare", "plot", "merge", "benchmark", "bench"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_task(folder / "data")
    write_weights(folder / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> list[str]:
    return ["-m", "vit_tiny_patch16_224", *SHAPE, "-w", str(place / "base.safetensors")]


@pytest.fixture(scope="module")
def tuned(place: Path, model: list[str]) -> Path:
    """A finished run, made by the command line."""
    folder = place / "tuned"
    arguments = ["finetune", *model, "-d", str(place / "data"), "-o", str(folder), "--quiet"]
    more = ["--epochs", "2", "--batch-size", "8", "-b", "400", "--rank", "2", "--json"]
    assert run([*arguments, *more]) == 0
    return folder


def output_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == 0
    return capsys.readouterr().out


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    text = output_of([*arguments, "--json"], capsys)
    value = json.loads(text)
    assert isinstance(value, dict)
    assert text.count("\n") == 1, "one line, one object"
    return value


def complaint_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a mistake is answered with: exit code 2, nothing on stdout, one line on stderr."""
    assert run(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1, streams.err
    assert streams.err.startswith("spt-kernels: ")
    return streams.err


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_teaches_by_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of([*([name] if name else []), "--help"], capsys)
    assert f"spt-kernels {name or 'finetune'} " in text.split("╭")[0].replace("Usage: ", "")
    assert max(len(line) for line in text.splitlines()) <= 80
    # typer dedents what follows the first paragraph, where all of it is examples but one
    assert [line for line in text.splitlines() if line.startswith(" spt-kernels ")] == []


def test_no_arguments_show_the_help_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    streams = capsys.readouterr()
    assert "Usage: spt-kernels" in streams.out + streams.err
    assert "--help shows the options" not in streams.out + streams.err


def test_help_comes_without_torch() -> None:
    code = (
        "import sys\n"
        "from spt_kernels.cli.app import run\n"
        "run(['finetune', '--help'])\n"
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_module_can_be_run() -> None:
    command = [sys.executable, "-m", "spt_kernels.cli", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    import spt_kernels

    assert done.stdout.strip() == spt_kernels.__version__


def test_options_that_would_not_be_read_are_refused(
    place: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(place / "base.safetensors")
    train = [*model, "-d", str(place / "data"), "-o", str(place / "none")]
    for arguments, words in (
        (["finetune", *train, "--classes", ""], "--classes: expected names with commas between"),
        (["predict", base, base, *model[:-2], "--classes", ","], "--classes: expected names"),
        (["memory", "-m", "resnet10t", "--method", ","], "--method: expected names with commas"),
        (["inspect", base, "--tensors", "-1"], "--tensors: expected 0 or more, got -1"),
        (["bench", "--compare", "a", "b", "--rounds", "3"], "--rounds: goes with table7, not with"),
        (["bench", "--compare", "a", "b", "-o", "c"], "--output: goes with table7, not with"),
    ):
        assert words in complaint_of(arguments, capsys)


def test_trained_values_are_shown_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tunable = spt.methods["lora-2"](tiny_vit())
    file = tmp_path / "trained.safetensors"
    tunable.save(file)
    shown = json_of(["inspect", str(file)], capsys)
    assert (shown["kind"], shown["numbers"]) == ("trained", tunable.trained + 5 * 24 + 5)
    assert "trained values" in output_of(["inspect", str(file)], capsys)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert run(["inspect", str(file)]) == 2
    assert "checksum mismatch" in capsys.readouterr().err


def test_a_task_tells_how_its_base_is_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quantize(tiny_vit())
    spt.apply(model, spt.allocate(skewed_sensitivity(model), 900, "lora", rank=2))
    spt.save_delta(model, tmp_path / "task.safetensors")
    command = ["inspect", str(tmp_path / "task.safetensors")]
    (kind,) = (shown := json_of(command, capsys)["quantized"])
    assert kind == "RowScaled"
    assert f"{shown[kind]} to RowScaled" in output_of(command, capsys)


def test_finetune_inspect_evaluate_and_merge_agree(
    tuned: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((tuned / "result.json").read_text())
    assert result["trained_parameters"] == 400
    seen = json_of(["evaluate", str(tuned)], capsys)
    assert seen["accuracy"] == result["test_accuracy"]
    assert seen["total"] == 18
    task = json_of(["inspect", str(tuned / "task.safetensors")], capsys)
    assert task["kind"] == "task"
    assert task["trained_parameters"] == 400
    assert task["file_bytes"] == result["task_bytes"]
    merged = place / "merged.safetensors"
    value = json_of(["merge", str(tuned), "-o", str(merged)], capsys)
    assert value["file_bytes"] == merged.stat().st_size
    base = load_file(place / "base.safetensors")
    state = load_file(merged)
    assert state.keys() == base.keys()
    assert all(state[n].shape == base[n].shape for n in base if not n.startswith("head."))
    assert json_of(["inspect", str(merged)], capsys)["kind"] == "state-dict"
    model = json.loads((tuned / "config.json").read_text())["job"]["model"]
    assert model["weights"] == str(place / "base.safetensors")


def test_a_merged_model_predicts_what_the_task_does(
    tuned: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "whole"
    out.mkdir()
    assert run(["merge", str(tuned), "-o", str(out / "model.safetensors")]) == 0
    (out / "config.json").write_text((tuned / "config.json").read_text())
    capsys.readouterr()
    whole = json_of(["evaluate", str(out)], capsys)
    task = json_of(["evaluate", str(tuned)], capsys)
    assert whole["correct"] == task["correct"]
    assert whole["loss"] == pytest.approx(task["loss"], abs=1e-4)
    alone = place / "alone.safetensors"
    assert run(["merge", str(tuned), "-o", str(alone)]) == 0
    assert run(["merge", str(tuned), "-o", str(place / "alone.pt")]) == 0
    capsys.readouterr()
    assert json_of(["inspect", str(place / "alone.pt")], capsys)["kind"] == "state-dict"
    data = ["-d", str(place / "data")]
    assert json_of(["evaluate", str(alone), *data], capsys) == whole
    shape = ["-m", "vit_tiny_patch16_224", *SHAPE, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    untold = json_of(["evaluate", str(place / "alone.pt"), *shape, *data], capsys)
    assert untold == {**whole, "classes_are_the_models": False}  # but those of the folders


def test_tables_are_for_people(
    tuned: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    two, shape = ["--method", "full,spt-lora"], ["-m", "vit_tiny_patch16_224", *SHAPE]
    for arguments, words in (
        (["inspect", str(tuned)], ["finished", "spt-lora", "task.safetensors"]),
        (
            ["inspect", str(tuned / "task.safetensors")],
            ["trained parameters", "400", "head.weight"],
        ),
        (["inspect", str(tuned / "plan.safetensors")], ["400"]),
        (
            ["inspect", str(tuned / "sensitivity.safetensors"), "--tensors", "2"],
            ["images", "blocks.0", "more (--tensors)"],
        ),
        (["evaluate", str(tuned)], ["blue", "green", "red", "all", "18"]),
        (
            ["memory", *shape, "--batch", "2", "--fits", "0.0001,0.01", *two],
            ["full", "spt-lora", "made-up", "Not counted", "█ weights", "none (", "in 0.01 GiB"],
        ),
        (["memory", *shape, "--method", "full", "--optimizer", "sgd"], ["100.0 %", "sgd, full"]),
    ):
        text = output_of(
            [*arguments, "--quiet"] if arguments[0] != "inspect" else arguments, capsys
        )
        for word in words:
            assert word in text, (arguments, word)
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(len(line) for line in lines if str(tuned.parent) not in line) <= 80, arguments


def test_a_measurement_speaks_of_no_epochs(
    place: Path, model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*model, "-d", str(place / "data"), "--batch-size", "64"]
    assert run(["sensitivity", *given, "-o", str(tmp_path / "s"), "--samples", "1"]) == 0
    said = capsys.readouterr().err
    assert "measuring sensitivity" in said
    assert "epoch" not in said


def test_sensitivity_then_plans_of_several_budgets(
    place: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "s.safetensors"
    arguments = [
        "sensitivity",
        *model,
        "-d",
        str(place / "data"),
        "-o",
        str(file),
        "--samples",
        "9",
    ]
    value = json_of([*arguments, "--head", "head.*", "-q"], capsys)
    assert value["samples"] == 9
    assert (value["head"], value["idle"]) == (["head"], [])
    assert sum(value["share_by_operation"].values()) == pytest.approx(1.0)
    for budget, expected in (("300", 300), ("0.4k", 400), ("1%", None), ("0.01", None)):
        plan = json_of(["plan", str(file), "-b", budget, "--rank", "2"], capsys)
        assert plan["trained_parameters"] == plan["budget"]
        assert (plan["head"], plan["head_source"]) == (["head.weight", "head.bias"], "given")
        assert plan["budget"] == expected or int(0.01 * plan["backbone_parameters"])
        assert sum(cell["structured"] for cell in plan["cells"]) == plan["structured_parameters"]
    out, picture = place / "p.safetensors", place / "p.png"
    more = ["--structured", "none", "-o", str(out), "--picture", str(picture)]
    plan = json_of(["plan", str(file), "-b", "300", *more], capsys)
    assert plan["structured_parameters"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json_of(["inspect", str(out)], capsys)["budget"] == 300
    assert (plan["from_block"], plan["forgone"]) == (None, 0)
    late = json_of(["plan", str(file), "-b", "300", "--rank", "2", "--from-block", "1"], capsys)
    assert late["from_block"] == "blocks.1"
    assert 0 < late["forgone"] < 1
    trained = {cell["block"] for cell in late["cells"] if cell["unstructured"] + cell["structured"]}
    assert "blocks.1" in trained
    assert "blocks.0" not in trained


def test_a_bare_resume_finds_its_job(
    tuned: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    value = json_of(["finetune", "--resume", "-o", str(tuned), "-q"], capsys)
    assert value["trained_parameters"] == 400
    assert "another job" in complaint_of(
        ["finetune", "--resume", "-o", str(tuned), *model, "-d", "."],
        capsys,
    )
    assert "--model" in complaint_of(
        ["finetune", "--resume", "-o", str(tuned), "--lr", "0.1"], capsys
    )


def test_lists_in_place_of_folders(
    place: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        names = sorted((place / "data" / split).rglob("*.png"))
        lines = [f"{path.relative_to(place / 'data')} {path.parent.name}\n" for path in names]
        (place / f"{split}.txt").write_text("".join(lines))
    arguments = ["finetune", *model, "-d", str(place / "data"), "--method", "linear", "-q"]
    lists = ["--train-list", str(place / "train.txt"), "--test-list", str(place / "test.txt")]
    more = ["--epochs", "1", "--val-share", "0", "-o", str(place / "listed")]
    value = json_of([*arguments, *lists, *more], capsys)
    assert value["images"] == {"train": 36, "test": 18}
    assert value["val_accuracy"] is None
    assert json_of(["evaluate", str(place / "listed"), "-q"], capsys)["total"] == 18


MISTAKES = {
    "no command": (["tune"], "No such command"),
    "no option": (["finetune", "--bugdet", "3", "-o", "x"], "--budget"),
    "no output": (["finetune"], "--output"),
    "no model": (["finetune", "-o", "{x}", "-d", "{data}"], "--model"),
    "no data": (["finetune", "-o", "{x}", "-m", "vit_tiny_patch16_224", "--pretrained"], "--data"),
    "no weights": (
        ["finetune", "-o", "{x}", "-m", "resnet18", "-d", "{data}"],
        "needs a pre-trained",
    ),
    "unknown model": (
        ["finetune", "-o", "{x}", "-m", "vit", "-w", "{base}", "-d", "{data}"],
        "timm has no",
    ),
    "unknown method": (["finetune", "-o", "{x}", "--method", "best"], "method: expected one of"),
    "budget 0": (["finetune", "-o", "{x}", "-b", "0"], "--budget: expected"),
    "budget -1": (["finetune", "-o", "{x}", "-b", "-1"], "--budget: expected"),
    "budget text": (["finetune", "-o", "{x}", "-b", "much"], "--budget: expected"),
    "budget 150%": (["finetune", "-o", "{x}", "-b", "150%"], "--budget: expected"),
    "budget above all": (
        ["finetune", "-o", "{x}", "-q", "-b", "9M", "{model}", "-d", "{data}"],
        "budget",
    ),
    "budget of linear": (["finetune", "-o", "{x}", "--method", "linear", "-b", "9"], "has none"),
    "model arg": (["finetune", "-o", "{x}", "-m", "vit", "--model-arg", "depth"], "KEY=VALUE"),
    "mean": (["finetune", "-o", "{x}", "{model}", "-d", "{data}", "--mean", "a,b"], "--mean"),
    "image size": (
        ["finetune", "-o", "{x}", "{model}", "-d", "{data}", "--image-size", "32"],
        "img_size=32",
    ),
    "device": (["finetune", "-o", "{x}", "{model}", "-d", "{data}", "--device", "tpu"], "device"),
    "graphs on a CPU": (
        ["finetune", "-o", "{x}", "{model}", "-d", "{data}", "--device", "cpu", "--graph"],
        "graph: CUDA graphs need a CUDA device, got cpu",
    ),
    "no folder": (["finetune", "-o", "{x}", "{model}", "-d", "{x}/none"], "no such folder"),
    "no images": (["finetune", "-o", "{x}", "{model}", "-d", "{empty}"], "train/"),
    "one class": (["finetune", "-o", "{x}", "{model}", "-d", "{one}"], "at least two classes"),
    "bad image": (
        ["finetune", "-o", "{x}", "{model}", "-d", "{bad}", "--epochs", "1"],
        "cannot read the image",
    ),
    "not empty": (
        ["finetune", "-o", "{data}", "{model}", "-d", "{data}"],
        "is not empty (--resume goes on with the run in it, --force overwrites it)",
    ),
    "demo onto something": (["demo", "-o", "{data}"], "is not empty; --force overwrites"),
    "not writable": (["finetune", "-o", "/proc/x", "{model}", "-d", "{data}"], "cannot write"),
    "nothing to resume": (["finetune", "-o", "{x}", "--resume"], "no run in"),
    "no file": (["inspect", "{x}/none"], "no such file"),
    "not ours": (["inspect", "{data}/train/red/000.png"], "no file of weights"),
    "not a run": (["evaluate", "{data}"], "no task.safetensors"),
    "not a plan": (["plan", "{base}"], "another kind of file"),
    "a plan of a folder": (["plan", "{data}"], "FILE: expected a file, got the folder {data}"),
    "no folder of training images": (
        ["finetune", "-o", "{x}", "{model}", "-d", "{empty}"],
        "(or give --train-list)",
    ),
    "a table of no benchmark": (["benchmark", "table", "{data}"], "spt-kernels: no benchmark in"),
    "not a task": (
        ["merge", "{base}", "-m", "vit_tiny_patch16_224", "-o", "{empty}/m.pt"],
        "{base}",
    ),
    "other base weights that are nowhere": (
        ["evaluate", "{data}", "-w", "{x}/none"],
        "--weights: no such file: {x}/none",
    ),
    "weights of a whole model": (["evaluate", "{base}", "{model}"], "is a whole model"),
    "merged as what": (["merge", "{base}", "-o", "{x}/m.ckpt"], "--output: expected a name that"),
    "merged nowhere": (["merge", "{base}", "-o", "{x}/no/m.pt"], "--output: no such folder"),
    "memory without model": (["memory"], "--model"),
    "memory of no method": (["memory", "{shape}", "--method", "prompt"], "spt-lora, spt-adapter"),
    "memory of no batch": (["memory", "{shape}", "--batch", "0"], "--batch: expected at least 1"),
    "memory in no GiB": (["memory", "{shape}", "--fits", "24GB"], "--fits: expected GiB as 24"),
    "memory all reserved": (
        ["memory", "{shape}", "--fits", "8", "--reserve", "8"],
        "--reserve: expected GiB from 0 to less than --fits, got 8",
    ),
    "memory of a plan and two methods": (
        ["memory", "{shape}", "--method", "lora,bias", "--plan", "x"],
        "--plan: goes with one --method",
    ),
    "memory of no plan": (["memory", "{shape}", "--plan", "x"], "plan: no such file: x"),
    "memory of two ranks": (
        ["memory", "{shape}", "--method", "lora-4", "--rank", "2"],
        "rank: method 'lora-4' has none",
    ),
    "memory of a rank for biases": (
        ["memory", "{shape}", "--method", "bias", "--rank", "2"],
        "rank: method 'bias' has none",
    ),
    "memory of rank 0": (["memory", "{shape}", "--rank", "0"], "rank: expected"),
    "memory of two of which one cannot be": (
        ["memory", "{shape}", "--method", "bias,spt-lora", "-b", "10M"],
        "budget: ",
    ),
    "memory of no pictures": (
        ["memory", "-m", "vit_tiny_patch16_224", "--image-size", "0"],
        "--image-size: expected at least 1, got 0",
    ),
    "memory drawn nowhere": (
        ["memory", "{shape}", "-o", "{x}/no/such/memory.png"],
        "--output: no such folder",
    ),
    "memory drawn on a folder": (
        ["memory", "{shape}", "-o", "{x}"],
        "--output: expected a picture",
    ),
    "memory drawn as text": (["memory", "{shape}", "-o", "{empty}/a.txt"], "expected a picture as"),
    "memory of no classes": (
        ["memory", "-m", "vit_tiny_patch16_224", "--num-classes", "0"],
        "--num-classes: expected at least 1, got 0",
    ),
    "bench into a file": (["bench", "-o", __file__], "--output: expected a folder, got the file"),
    "bench below a file": (["bench", "-o", f"{__file__}/a"], "--output: expected a folder, got"),
    "bench into nothing": (["bench", "-o", "/proc/a/b"], "--output: cannot write to /proc ("),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(
    name: str,
    place: Path,
    model: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, counts in (("one", {"red": 4}), ("bad", {"red": 4, "blue": 4})):
        if not (place / folder).exists():
            write_images(place / folder / "train", counts)
    (place / "bad" / "train" / "red" / "002.png").write_bytes(b"\x89PNG but no more")
    (place / "empty").mkdir(exist_ok=True)
    values = {name: str(place / name) for name in ("data", "one", "bad", "empty")}
    values |= {
        "x": str(tmp_path / "x"),
        "base": str(place / "base.safetensors"),
        "model": "{model}",
        "shape": "{shape}",
    }
    arguments: list[str] = []
    template, words = MISTAKES[name]
    for part in template:
        filled = part.format(**values)
        more = {"{model}": model, "{shape}": ["-m", "vit_tiny_patch16_224", *SHAPE]}
        arguments += more.get(filled, [filled])
    assert words.format(**values) in complaint_of([*arguments], capsys)


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which the command line knows by name."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped; --resume goes on with the run"),
        (OutOfMemoryError("CUDA out of memory"), 2, "out of memory: try --memory SIZE"),
        (
            PermissionError(13, "Permission denied", "result.json"),
            2,
            "result.json: Permission denied",
        ),
    ],
    ids=["ctrl-c", "memory", "system"],
)
def test_what_befalls_a_run_is_told_in_one_line(
    error: BaseException,
    code: int,
    words: str,
    tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("spt_kernels.finetuning.pipeline.finetune", fail)
    assert run(["finetune", "--resume", "-o", str(tuned)]) == code
    streams = capsys.readouterr()
    assert words in streams.err
    assert streams.out == ""
    assert streams.err.strip().count("\n") == 0  # after ^C the line starts afresh


def test_a_run_that_is_stopped_before_it_begins_has_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spt_kernels.finetuning.pipeline.finetune", stop)
    start = ["finetune", "-m", "vit_tiny_patch16_224", "--method", "full", "-d", "photos"]
    assert run([*start, "-o", str(tmp_path / "run")]) == 130
    said = "stopped before the run had begun; the same command starts it"
    assert said in capsys.readouterr().err


def test_a_run_on_scenes_without_memory_is_told_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("spt_kernels.segmentation.pipeline.segment", fail)
    start = ["segment", "-m", "vit_tiny_patch16_224", "--method", "full", "-d", "scenes"]
    words = "out of memory: try --recompute block, --resume goes on with it, or --force with a"
    assert words in complaint_of([*start, "-o", str(tmp_path / "run")], capsys)


def test_our_own_mistakes_keep_their_traceback(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("spt_kernels.finetuning.pipeline.finetune", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["finetune", "--resume", "-o", str(tuned)])


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--budget"):
        run(["finetune", "-o", str(tmp_path / "x"), "-b", "0", "--debug"])


def test_a_task_on_other_weights_is_refused(
    tuned: Path, place: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    other = place / "other.safetensors"
    state = load_file(place / "base.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, other)
    shape = ["-m", "vit_tiny_patch16_224", *SHAPE, "-w", str(other)]
    said = complaint_of(["evaluate", str(tuned), *shape], capsys)
    assert "blocks." in said


def test_progress_is_on_stderr_alone(
    place: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", *model, "-d", str(place / "data"), "-o", str(place / "spoken")]
    assert run([*arguments, "--method", "linear", "--epochs", "1", "--json"]) == 0
    streams = capsys.readouterr()
    json.loads(streams.out)
    assert "training 2/2" in streams.err or "training 1/1" in streams.err


def test_bench_measures_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(row: str, setting: CostSetting) -> dict:
        if row == SENSITIVITY:
            return asdict(measure_sensitivity_speed(setting))
        return asdict(measure_row(row, setting))

    # that each row has a process of its own is for the tests of the table to say
    monkeypatch.setattr(table7, "_in_a_process", in_this_process)
    arguments = ["bench", "table7", "-m", "vit_tiny_patch16_224", *SHAPE, "-o", str(tmp_path)]
    sizes = ["--batch-size", "4", "--timed-batch-size", "2", "--rounds", "1"]
    text = output_of([*arguments, *sizes, "--ways", "linear,spt-lora", "--quiet"], capsys)
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith("written to")]
    assert max(map(len, lines)) <= 80
    assert "samples / s" in text
    (path,) = tmp_path.glob("*.json")
    (entry,) = json.loads(path.read_text())["tables"].values()
    assert [row["method"] for row in entry["rows"]] == ["linear", "spt-lora"]
    assert entry["memory"] == "accounted"
    (picture,) = tmp_path.glob("table7-*.png")
    assert picture.stat().st_size > 0


def test_bench_compares_two_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for folder, ours in (("old", 1.0), ("same", 1.02), ("worse", 1.5)):
        row = {"min_ms": ours, "max_ms": ours, "median_ms": ours}
        rows = [{"name": "ours", **row}, {"name": "theirs", **row, "ours_over_this": ours}]
        results = {"machine": {}, "contests": {"op: sum": {"rows": rows}}}
        paths.append(tmp_path / f"{folder}.json")
        paths[-1].write_text(json.dumps(results))
    old, same, worse = map(str, paths)
    assert "0 worse" in output_of(["bench", "--compare", old, same], capsys)
    assert run(["bench", "--compare", old, worse]) == 1
    assert "+50.0%" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("[]")
    assert run(["bench", "--compare", old, str(tmp_path / "other.json")]) == 2
    assert "other.json" in capsys.readouterr().err
