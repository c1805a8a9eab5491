"""The options of what is trained, and how."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..finetuning.job.presets import PRESETS, Preset, preset_of
from ..finetuning.job.recipe import Recipe
from ..methods import METHODS, Method
from ..methods.noah_architecture import NoahArchitecture
from .options import described

_METHOD = "Method"
HEAD_HELP = (
    "Trained whole besides: a layer or a pattern, several times if need be, or none [the last "
    "layers before the loss]."
)
FROM_BLOCK_HELP = (
    "Tune nothing before this block, which saves its memory: 6, or a name as stages.2 [the first]."
)
OFFLOAD_HELP = (
    "On the host, fetched when used: frozen weights, as frozen or forward-only, and of full, "
    "partial-K the optimizer's, as state [nothing]."
)
_RUN = "Run"
_RECIPE = "Recipe (the defaults are the paper's)"
TENSORBOARD = described(_RUN, "--tensorboard", "Events for TensorBoard in the folder.")


@dataclass(frozen=True)
class BackboneMethodOptions:
    """What is trained of a model whose head is known."""

    method: Annotated[
        str | None, described(_METHOD, "--method NAME", f"{', '.join(METHODS)} [{Method.name}].")
    ] = None
    budget: Annotated[
        str | None,
        described(
            _METHOD,
            "--budget -b N",
            "Trained parameters beside the head: 400000, 0.4M, or a share of the backbone, "
            "0.005 or 0.5% [0.5%; lora: as its rank].",
        ),
    ] = None
    rank: Annotated[
        int | None,
        described(
            _METHOD, "--rank R", "Of LoRA and Adapter [8; lora with --budget: what fits it]."
        ),
    ] = None
    samples: Annotated[
        int | None,
        described(
            _METHOD, "--samples N", f"Images that sensitivity is measured on [{Method.samples}]."
        ),
    ] = None
    rule: Annotated[
        str | None, described(_METHOD, "--rule NAME", f"paper or published-code [{Method.rule}].")
    ] = None
    dropout: Annotated[
        float | None,
        described(_METHOD, "--dropout P", f"LoRA's input dropout [{Method.dropout:g}]."),
    ] = None

    from_block: Annotated[str | None, described(_METHOD, "--from-block B", FROM_BLOCK_HELP)] = None

    def given(self) -> dict[str, Any]:
        """The fields of `Method` that were given, its name aside."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "method"}
        values["budget"] = parse_budget(self.budget)
        values["from_block"] = parse_block(self.from_block)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class GivenOptions:
    """What decides in place of the images."""

    sensitivity: Annotated[
        Path | None, described(_METHOD, "--sensitivity FILE", "Measured before; not again.")
    ] = None
    plan: Annotated[Path | None, described(_METHOD, "--plan FILE", "Made before; not again.")] = (
        None
    )

    def method(self, what: BackboneMethodOptions, otherwise: Method) -> Method:
        """The method that made the plan, if there is one; `otherwise` without.

        Raises:
            ValueError: no such file, or what is asked for contradicts it.
        """
        from ..finetuning.job import given_plan

        if self.plan is not None:
            made = given_plan.load_plan(self.plan)
            given_plan.check_agrees(made, what.method, what.given())
            return given_plan.method_of(made, what.method)
        if self.sensitivity is not None and what.samples is not None:
            given = given_plan.load_sensitivity(self.sensitivity)
            given_plan.check_samples(given.num_samples, what.samples)
        return otherwise

    def files(self) -> dict[str, Any]:
        """As arguments of a job."""
        named = {"sensitivity": self.sensitivity, "plan": self.plan}
        return {n: None if path is None else str(path.resolve()) for n, path in named.items()}


@dataclass(frozen=True)
class MethodOptions(BackboneMethodOptions):
    """What is trained."""

    head: Annotated[list[str] | None, described(_METHOD, "--head NAME", HEAD_HELP)] = None
    supernet_epochs: Annotated[
        int | None,
        described(
            _METHOD,
            "--supernet-epochs N",
            f"Of noah, before it searches [{Method.supernet_epochs}].",
        ),
    ] = None
    generations: Annotated[
        int | None,
        described(_METHOD, "--generations N", f"Of noah's search [{Method.generations}]."),
    ] = None
    architecture: Annotated[
        Path | None,
        described(_METHOD, "--architecture FILE", "Of noah, found before; no search."),
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields of `Method` that were given, its name aside."""
        values = super().given() | {"head": parse_head(self.head)}
        if self.architecture is not None:
            for name in ("supernet_epochs", "generations"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: with --architecture nothing is searched; leave it out"
                    )
            values["architecture"] = NoahArchitecture.load(self.architecture)
        return {name: value for name, value in values.items() if value is not None}

    def chosen(self, preset: Preset) -> Method:
        """The method described, with the options of the preset where none are given."""
        return preset.method(self.method or Method.name, **self.given())


@dataclass(frozen=True)
class RecipeOptions:
    """How it is trained."""

    recipe: Annotated[
        str | None,
        described(
            _RECIPE,
            "--recipe NAME",
            f"{', '.join(PRESETS)}: all of it, preprocessing and the method's options too; what is "
            "given besides goes first.",
        ),
    ] = None
    epochs: Annotated[
        int | None,
        described(_RECIPE, "--epochs N", f"Passes over the training images [{Recipe.epochs}]."),
    ] = None
    batch_size: Annotated[
        int | None, described(_RECIPE, "--batch-size N", f"Images per step [{Recipe.batch_size}].")
    ] = None
    micro_batch: Annotated[
        int | None,
        described(
            _RECIPE, "--micro-batch N", "Images at a time, for less memory [all of the batch]."
        ),
    ] = None
    recompute: Annotated[
        str | None,
        described(
            _RECIPE,
            "--recompute WHAT",
            "For less memory, to the same bits: mlp, qkv, attention or block, of all blocks or of "
            "some, as block@0-5,mlp@6-11 [nothing].",
        ),
    ] = None
    memory_bytes: Annotated[
        str | None,
        described(
            _RECIPE,
            "--memory SIZE",
            "Of the card, as 8GiB: decides --micro-batch and --recompute [any].",
        ),
    ] = None
    offload: Annotated[str | None, described(_RECIPE, "--offload WHAT", OFFLOAD_HELP)] = None
    lr: Annotated[
        float | None,
        described(_RECIPE, "--lr X", "Peak learning rate [1e-3; full, partial-K: 1e-4]."),
    ] = None
    weight_decay: Annotated[
        float | None,
        described(_RECIPE, "--weight-decay X", f"Of matrices [{Recipe.weight_decay:g}]."),
    ] = None
    warmup_epochs: Annotated[
        float | None,
        described(_RECIPE, "--warmup-epochs N", "Linear, then a cosine [a tenth of the epochs]."),
    ] = None
    drop_path: Annotated[
        float | None,
        described(_RECIPE, "--drop-path P", "Stochastic depth [0.1 where the model has it]."),
    ] = None
    label_smoothing: Annotated[
        float | None, described(_RECIPE, "--label-smoothing P", f"[{Recipe.label_smoothing:g}]")
    ] = None
    clip_grad: Annotated[
        float | None, described(_RECIPE, "--clip-grad X", "Largest norm [any].")
    ] = None
    val_every: Annotated[
        int | None,
        described(_RECIPE, "--val-every N", f"Epochs between validations [{Recipe.val_every}]."),
    ] = None
    patience: Annotated[
        int | None,
        described(_RECIPE, "--patience N", "End after so many epochs that are no better [never]."),
    ] = None
    amp: Annotated[
        str | None, described(_RECIPE, "--amp NAME", f"none or bf16 autocast [{Recipe.amp}].")
    ] = None
    augment: Annotated[
        str | None,
        described(
            _RECIPE,
            "--augment HOW",
            "none, or at random crop-flip, random-crop-flip or resized-crop-flip [none].",
        ),
    ] = None
    schedule: Annotated[
        str | None,
        described(
            _RECIPE,
            "--schedule NAME",
            f"step, or epoch as the published code has it [{Recipe.schedule}].",
        ),
    ] = None
    approximate: Annotated[
        str | None,
        described(
            _RECIPE,
            "--approximate WHAT",
            "Less memory for approximate gradients: gelu-2bit, gelu-8bit, layer-norm-from-output, "
            "or one of each and a comma [nothing].",
        ),
    ] = None
    seed: Annotated[
        int | None, described(_RECIPE, "--seed N", f"Of everything drawn [{Recipe.seed}].")
    ] = None

    def preset(self) -> Preset:
        """The preset that is named, or the defaults."""
        return Preset(Recipe()) if self.recipe is None else preset_of(self.recipe)

    def overrides(self) -> dict[str, Any]:
        """The fields of `Preprocessing` that were given here."""
        return {} if self.augment is None else {"augment": self.augment}

    def chosen(self, base: Recipe | None = None) -> Recipe:
        """The recipe described; what is not said is the preset's, or as in `base`, or the paper's.

        Raises:
            ValueError: a value is impossible, or there is no such preset.
        """
        start = self.preset().recipe if base is None or self.recipe is not None else base
        return replace(start, **self._given())

    def resumed(self, was: Recipe) -> Recipe:
        """The recipe of a run that goes on, with what is said of its length and how it fits.

        A memory takes the place of what it decides, and the other way round.

        Raises:
            ValueError: a value is impossible.
        """
        given = self._given()
        if "memory_bytes" in given:
            was = replace(was, micro_batch=None, recompute=None)
        elif given.keys() & {"micro_batch", "recompute"}:
            was = replace(was, memory_bytes=None)
        return replace(was, **given)

    def _given(self) -> dict[str, Any]:
        """The fields of `Recipe` that were given."""
        values = {f.name: getattr(self, f.name, None) for f in fields(Recipe) if f.name != "preset"}
        if self.memory_bytes is not None:
            values["memory_bytes"] = parse_bytes("--memory", self.memory_bytes)
        return {name: v for name, v in values.items() if v is not None}


@dataclass(frozen=True)
class RunOptions:
    """Where a run goes, and how it is done."""

    output: Annotated[Path, described(_RUN, "--output -o FOLDER", "Where all results go.")]
    resume: Annotated[bool, described(_RUN, "--resume", "Go on with a run that was killed.")] = (
        False
    )
    force: Annotated[
        bool, described(_RUN, "--force", "Overwrite the run in the output folder.")
    ] = False
    graph: Annotated[
        bool | None,
        described(_RUN, "--graph/--no-graph", "Steps as CUDA graphs [on a card, where they can]."),
    ] = None

    def check_whole(self, source: object, longer: str) -> None:
        """Refuse to resume with a part of the job: none of it is said, or all.

        Args:
            source: of the model; None where it was not given.
            longer: the options that may be given by themselves.

        Raises:
            ValueError: the model was not given, and something else of the job was.
        """
        if self.resume and source is None:
            raise ValueError(
                f"--resume: beside it expected {longer} alone, or the whole job from --model on, "
                "as the run was started"
            )


def parse_head(patterns: list[str] | None) -> tuple[str, ...] | None:
    """`--head` as often as it was given; `none` alone is no head."""
    if not patterns:
        return None
    if "none" in patterns and len(patterns) > 1:
        raise ValueError(f"--head: expected none alone, or names, got {', '.join(patterns)}")
    return () if patterns == ["none"] else tuple(patterns)


def parse_block(text: str | None) -> int | str | None:
    """`6` as the number of a block, anything else as its name."""
    return int(text) if text is not None and text.isdecimal() else text


def parse_bytes(flag: str, text: str) -> int:
    """`8GiB`, `8G` or `0.5 GiB`, `512MiB`, `512M` as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([gm])(ib)?", text.strip().lower())
    number = 0.0 if found is None else float(found[1])
    if found is None or number == 0:
        raise ValueError(f"{flag}: expected a size as 8GiB or 512MiB, got {text!r}")
    return int(number * (2**30 if found[2] == "g" else 2**20))


def parse_budget(text: str | None) -> int | float | None:
    """`400000`, `400k`, `0.4M`, `0.005` or `0.5%` as a number of parameters or a share below 1."""
    if text is None:
        return None
    units = {"k": 1e3, "m": 1e6, "%": 1e-2}
    unit = units.get(text[-1:].lower())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        number = float("nan")
    # 1.0 is no number of parameters: whoever writes it means all of them
    is_share = unit == 1e-2 or (unit is None and ("." in text or 0 < number < 1))
    if (
        not 0 < number < math.inf
        or (is_share and number >= 1)
        or (not is_share and number != round(number))
    ):
        raise ValueError(
            "--budget: expected a number of parameters (400000, 0.4M) or a share of the backbone "
            f"below 1 (0.005, 0.5%), got {text!r}; --method full trains all of it"
        )
    return number if is_share else round(number)
