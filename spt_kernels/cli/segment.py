"""`spt-kernels segment`: scenes with a label for every pixel in, a task file out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..methods import Method
from ..segmentation.recipe import SegmentationRecipe
from ..segmentation.suited import SUITED, check_suited
from .command import named_of
from .options import MachineOptions, WeightsOptions, described, parse_floats
from .terminal import Terminal, best_told, count, facts, percent, size
from .training_options import TENSORBOARD, BackboneMethodOptions, GivenOptions, RunOptions

if TYPE_CHECKING:
    from ..segmentation.job import SegmentationJob

HELP = """Tune a ViT to label every pixel, and keep what it learnt in a small file.

As in the paper's Table 5: SETR-PUP on ADE20K, the decoder trained whole, of
the ViT what is sensitive. The folder is laid out as ADE20K's:
images/training, images/validation, annotations/training and
annotations/validation, the annotations being PNGs with 0 for no class, and
objectInfo150.txt with the names of the classes:

  spt-kernels segment -m vit_large_patch16_224 -w vit.safetensors \\
      -d ADEChallengeData2016 -o runs/ade

A smaller ViT, a shorter training, less memory:

  spt-kernels segment -m vit_small_patch16_224 --pretrained \\
      -d ADEChallengeData2016 -o runs/small \\
      --iterations 20000 --batch-size 8 --amp bf16

After a kill, the first of these; the second tests it once more, at several
scales, and writes what it takes each pixel for:

  spt-kernels segment --resume -o runs/ade
  spt-kernels evaluate runs/ade --multi-scale --save-predictions labels

The validation images are the test: they are looked at once, at the end. A share
of the training images that is held out tells which iteration was best, and
ends a run that gets no better:

  spt-kernels segment … --val-share 0.05 --patience 10000 -o runs/patient

The output folder gets task.safetensors, or trained.safetensors of a method
without a plan, or model.safetensors where all is trained, of the last
iteration; best-task.safetensors and so on, where an earlier one was better; the
plan and the sensitivity where there are such; metrics.jsonl, result.json,
config.json, log.txt, state.pt and pictures.

The sensitivity of one run spares another its measuring, at any budget; a plan,
or a sensitivity, that is given decides: what contradicts it is refused.

  spt-kernels segment … --sensitivity runs/ade/sensitivity.safetensors \\
      --method spt-adapter --budget 0.3% -o runs/adapter
"""

_SCENES = "Scenes"
_DECODER = "Decoder"
_RECIPE = "Recipe (SETR's on ADE20K, with AdamW)"
_RUN = "Run"
_TEST = "Test"


@dataclass(frozen=True)
class SceneOptions:
    """The scenes of a task, and how they come to the model."""

    data: Annotated[
        Path | None, described(_SCENES, "--data -d FOLDER", "ADEChallengeData2016, or like it.")
    ] = None
    size: Annotated[
        int | None, described(_SCENES, "--crop N", "Side of what is seen at once [512].")
    ] = None
    stride: Annotated[
        int | None,
        described(_SCENES, "--stride N", "From window to window in tests [2/3 of --crop: 341]."),
    ] = None
    mean: Annotated[
        str | None, described(_SCENES, "--mean R,G,B", "Of values in 0…1 [the model's].")
    ] = None
    std: Annotated[str | None, described(_SCENES, "--std R,G,B", "Likewise [the model's].")] = None
    val_share: Annotated[
        float | None,
        described(
            _SCENES,
            "--val-share SHARE",
            "Hold out this share of the training images, to know the best iteration by [0]. "
            "validation/ is only ever used once, at the end.",
        ),
    ] = None
    channels: Annotated[
        int | None, described(_DECODER, "--channels N", "Of its convolutions [256].")
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields of `SegmentationJob` that were given, the folder aside."""
        values = {
            "size": self.size,
            "stride": self.stride,
            "mean": parse_floats("--mean", self.mean),
            "std": parse_floats("--std", self.std),
            "channels": self.channels,
            "val_share": self.val_share,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class PixelMethodOptions(BackboneMethodOptions):
    """What is trained of the ViT."""

    method: Annotated[
        str | None, described("Method", "--method NAME", f"{', '.join(SUITED)} [{Method.name}].")
    ] = None


@dataclass(frozen=True)
class SegmentationRecipeOptions:
    """How it is trained."""

    iterations: Annotated[
        int | None, described(_RECIPE, "--iterations N", "Training steps [160000].")
    ] = None
    batch_size: Annotated[
        int | None, described(_RECIPE, "--batch-size N", "Images per step [16].")
    ] = None
    lr: Annotated[
        float | None,
        described(_RECIPE, "--lr X", "Peak learning rate [1e-3; full, partial-K: 1e-4]."),
    ] = None
    weight_decay: Annotated[
        float | None, described(_RECIPE, "--weight-decay X", "Of matrices [1e-4].")
    ] = None
    warmup_iterations: Annotated[
        int | None,
        described(_RECIPE, "--warmup-iterations N", "Linear [a tenth of them, at most 1500]."),
    ] = None
    auxiliary_weight: Annotated[
        float | None,
        described(_RECIPE, "--auxiliary-weight X", "Of each auxiliary head's loss [0.4]."),
    ] = None
    drop_path: Annotated[
        float | None, described(_RECIPE, "--drop-path P", "Stochastic depth [0].")
    ] = None
    clip_grad: Annotated[
        float | None, described(_RECIPE, "--clip-grad X", "Largest norm [any].")
    ] = None
    val_every: Annotated[
        int | None,
        described(
            _RECIPE,
            "--val-every N",
            f"Iterations between looks at what is held out [{SegmentationRecipe.val_every}].",
        ),
    ] = None
    patience: Annotated[
        int | None,
        described(
            _RECIPE, "--patience N", "End after so many iterations that are no better [never]."
        ),
    ] = None
    amp: Annotated[
        str | None, described(_RECIPE, "--amp NAME", "none or bf16 autocast [none].")
    ] = None
    recompute: Annotated[
        str | None,
        described(
            _RECIPE,
            "--recompute WHAT",
            "For less memory, to the same bits: mlp, qkv, attention or block, of the ViT's blocks "
            "or of some, as block@0-5,mlp@6-11 [nothing].",
        ),
    ] = None
    seed: Annotated[int | None, described(_RECIPE, "--seed N", "Of everything drawn [0].")] = None

    def given(self) -> dict[str, Any]:
        """The fields of `SegmentationRecipe` that were given."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def chosen(self) -> SegmentationRecipe:
        """The recipe described."""
        return SegmentationRecipe(**self.given())


def run(
    terminal: Terminal,
    context: typer.Context,
    model: WeightsOptions,
    scenes: SceneOptions,
    what: PixelMethodOptions,
    given: GivenOptions,
    recipe: SegmentationRecipeOptions,
    running: RunOptions,
    checkpoint_seconds: Annotated[
        float,
        described(
            _RUN,
            "--checkpoint-every SECONDS",
            "Least time between two, each after 50 iterations [60].",
        ),
    ] = 60.0,
    tensorboard: Annotated[bool, TENSORBOARD] = False,
    *,
    machine: MachineOptions,
    multi_scale: Annotated[
        bool, described(_TEST, "--multi-scale", "Test at six scales and mirrored as well.")
    ] = False,
    save_predictions: Annotated[
        Path | None,
        described(
            _TEST, "--save-predictions FOLDER", "Label maps, and these laid over the images."
        ),
    ] = None,
) -> None:
    """Collect the job, run it, show its figures."""
    groups = (model, scenes, what, given, recipe)
    named = {f.name for group in groups for f in fields(group)}
    is_bare_resume = running.resume and not named_of(context, named - {"iterations", "recompute"})
    if not is_bare_resume:
        running.check_whole(model.source(), "--iterations, --recompute")
    job = _job_in(running.output, recipe) if is_bare_resume else _job(*groups)
    from ..finetuning.folder.run_folder import RunFolder
    from ..segmentation.pipeline import segment

    with terminal.progress() as progress:
        result = segment(
            job,
            running.output,
            resume=running.resume,
            force=running.force,
            device=machine.device,
            workers=machine.workers,
            checkpoint_seconds=checkpoint_seconds,
            graph=running.graph,
            multi_scale=multi_scale,
            save_predictions=save_predictions,
            progress=progress,
            tensorboard=tensorboard,
        )
    written = RunFolder(running.output).written()
    value = {"output": str(running.output), **result, "written": written}
    lines = [*_lines(result, running.output), ("written", ", ".join(written))]
    terminal.show(value, facts(lines))


def _job(
    model: WeightsOptions,
    scenes: SceneOptions,
    what: PixelMethodOptions,
    given: GivenOptions,
    recipe: SegmentationRecipeOptions,
) -> SegmentationJob:
    # method and recipe first: they are checked without a look at any file
    name = what.method or Method.name
    check_suited(name)
    method, how = given.method(what, Method(name, **what.given())), recipe.chosen()
    from ..segmentation.job import SegmentationJob

    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    if scenes.data is None:
        raise ValueError("--data: name the folder of the scenes")
    if recipe.val_every is not None and not scenes.val_share:
        raise ValueError("--val-every: nothing is held out to look at; give --val-share as well")
    data = str(scenes.data.resolve())
    return SegmentationJob(source, data, method, how, **scenes.given(), **given.files())


def _job_in(folder: Path, recipe: SegmentationRecipeOptions) -> SegmentationJob:
    """The job of the run in a folder, with what is said of its length and of its memory."""
    from ..finetuning.folder.run_folder import RunFolder
    from ..finetuning.run.run import config_in
    from ..segmentation.job import SegmentationJob

    found = RunFolder(folder)
    config = config_in(found, SegmentationJob.command)
    if config is None:
        raise ValueError(
            f"--resume: no run in {folder}; give the model and the scenes to start one"
        )
    job = found.job_of(config, SegmentationJob.from_json)
    return replace(job, recipe=replace(job.recipe, **recipe.given()))


def _lines(result: dict[str, Any], output: Path) -> list[tuple[str, str]]:
    trained, backbone = result["trained_parameters"], result["backbone_parameters"]
    lines = [
        ("method", result["method"]),
        (
            "trained parameters",
            f"{count(trained)} ({percent(trained / backbone, 2)} of the backbone, and a decoder of "
            f"{count(result['head_parameters'])})",
        ),
        ("mIoU", percent(result["miou"])),
    ]
    if result.get("stopped_early"):  # which results of older versions do not tell
        lines.insert(1, ("iterations", f"{count(result['iterations'])}, stopped early"))
    if result.get("val_miou") is not None:
        when = f"iteration {count(result['best_iteration'])}"
        lines.append(("validation mIoU", best_told(result, "val_miou", when)))
    if result["miou_multi_scale"] is not None:
        lines.append(("mIoU, multi-scale", percent(result["miou_multi_scale"])))
    lines += [
        ("pixel accuracy", percent(result["pixel_accuracy"])),
        ("step", f"{result['step_ms']:,.0f} ms"),
    ]
    if "accounted_peak_bytes" in result:  # likewise
        lines.append(("peak memory, accounted", size(result["accounted_peak_bytes"])))
    if result["measured_peak_bytes"] is not None:
        lines.append(("peak memory, measured", size(result["measured_peak_bytes"])))
    return [*lines, (result["file"], f"{size(result['task_bytes'])}, in {output}")]
