"""`spt-kernels memory`: what a training step would need, without running one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..approximation.choice import parse_approximation
from ..methods import METHODS
from ..offloading import OffloadWords
from .options import ArchitectureOptions, BudgetOfMethods, SizeOptions, described, split_names
from .terminal import Terminal
from .training_options import FROM_BLOCK_HELP, parse_block, parse_budget
from .written import check_picture

if TYPE_CHECKING:
    from ..memory import MemoryEstimate
    from ..memory.rows import Answer, Row

HELP = """Will it fit? Account for the memory of a training step, without a GPU.

Neither weights nor images are needed, and none are read. All methods side
by side, then one of them, then the largest batch for three cards:

  spt-kernels memory -m vit_base_patch16_224
  spt-kernels memory -m vit_base_patch16_224 --method full --batch 32
  spt-kernels memory -m vit_base_patch16_224 --fits 8,12,24

What helps when it does not fit, and the picture:

  spt-kernels memory -m convnext_base --method full --checkpointing \\
      --dtype bf16-autocast --image-size 288
  spt-kernels memory -m vit_base_patch16_224 -o memory.png

A plan of your own; without one, spt-* methods choose by made-up scores
that are as skewed as measured ones:

  spt-kernels memory -m vit_base_patch16_224 --plan photos.plan

Not counted: the CUDA context (about 0.5 GiB), what the allocator rounds
up, what kernels allocate within themselves. --reserve keeps room for it.
"""

_LESS = ("approximate", "recompute", "offload")  # options that --json repeats
_MADE_UP = "spt-*, sensitive-*: by made-up scores, skewed as real ones; --plan takes yours."
_NOT_COUNTED = {
    "cuda": "Not counted: the CUDA context (about 0.5 GiB), what the allocator rounds up.",
    "cpu": "Not counted: the process without its model, and holes that its allocator keeps.",
}


@dataclass(frozen=True)
class StepOptions(SizeOptions):
    """What is trained, on which batch."""

    method: Annotated[
        str | None,
        described(
            "Step", "--method A,B,…", f"{', '.join(METHODS)} [all but baselines, side by side]."
        ),
    ] = None
    plan: Annotated[Path | None, described("Step", "--plan FILE", "A row for this plan.")] = None
    budget: BudgetOfMethods = None
    rank: Annotated[
        int | None, described("Step", "--rank R", "Of lora and spt-* [8; the table's lora 16].")
    ] = None
    from_block: Annotated[
        str | None,
        described("Step", "--from-block B", f"Of spt-*, sensitive-*: {FROM_BLOCK_HELP}"),
    ] = None
    micro_batch: Annotated[
        int | None,
        described(
            "Step", "--micro-batch N", "Images at a time, the gradients summed [all of the batch]."
        ),
    ] = None
    checkpointing: Annotated[
        bool, described("Step", "--checkpointing", "Recompute blocks in the backward.")
    ] = False
    approximate: Annotated[
        str | None,
        described("Step", "--approximate WHAT", "As finetune has it: gelu-2bit, … [nothing]."),
    ] = None
    recompute: Annotated[
        str | None,
        described("Step", "--recompute WHAT", "As finetune has it: mlp, block@0-5, … [nothing]."),
    ] = None
    offload: Annotated[
        str | None,
        described("Step", "--offload WHAT", "As finetune has it: frozen, state, … [nothing]."),
    ] = None
    optimizer: Annotated[
        str, described("Step", "--optimizer NAME", "adamw, sgd or none [adamw].")
    ] = "adamw"
    device: Annotated[
        str, described("Step", "--device NAME", "As cuda or as cpu computes [cuda].")
    ] = "cuda"
    inference: Annotated[
        bool, described("Step", "--inference", "A forward alone; of the plain model by default.")
    ] = False

    @property
    def training(self) -> bool:
        """Whether it is more than a forward."""
        return not self.inference

    def how(self) -> dict[str, Any]:
        """The arguments of `estimate_memory` that all rows have in common."""
        return {
            "dtype": self.dtype,
            "micro_batch": self.micro_batch,
            "checkpointing": self.checkpointing,
            "optimizer": self.optimizer,
            "device": self.device,
            "training": self.training,
        }

    def check_parts(self) -> None:
        """Refuse parts of a batch of nothing, and what a forward alone does not do or have."""
        if self.inference and self.method is None and self.plan is None:
            of_methods = {
                "--budget": self.budget,
                "--rank": self.rank,
                "--from-block": self.from_block,
            }
            for option, value in of_methods.items():
                if value is not None:
                    raise ValueError(f"{option}: inference is of the plain model; name a --method")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"--micro-batch: expected at least 1, got {self.micro_batch}")
        if self.micro_batch is not None and self.inference:
            raise ValueError("--micro-batch: inference sums up no gradients; leave it out")
        if self.recompute is not None and self.inference:
            raise ValueError("--recompute: inference has no backward; leave it out")

    def away(self) -> OffloadWords:
        """What is on the host.

        Raises:
            ValueError: there is no such thing, or it is the state of another optimizer.
        """
        away = OffloadWords.parse(self.offload)
        if away.state and (self.inference or self.optimizer != "adamw"):
            kind = "inference" if self.inference else self.optimizer
            raise ValueError(f"--offload: state is that of adamw, got {kind}")
        return away

    def named(self) -> list[str]:
        """What is done to need less memory, as a title has it."""
        told = {
            "{}": self.approximate,
            "{} computed again": self.recompute,
            "{} on the host": self.offload,
        }
        return [w.format(what) for w, what in told.items() if what not in (None, "nothing")]


@dataclass(frozen=True)
class FitOptions:
    """What it has to fit in."""

    fits: Annotated[
        str | None, described("Fit", "--fits GIB,…", "The largest batch in 8 or 8,12,24 GiB.")
    ] = None
    reserve: Annotated[float, described("Fit", "--reserve GIB", "Keep so much of it free [0].")] = (
        0.0
    )

    def limits(self) -> dict[float, int]:
        """Bytes by the GiB that were named."""
        try:
            named = [float(part) for part in split_names(self.fits)]
        except ValueError:
            named = [0.0]
        if self.fits is not None and not (named and all(0 < gib < 2**30 for gib in named)):
            raise ValueError(f"--fits: expected GiB as 24 or 8,12,24, got {self.fits!r}")
        if self.reserve and self.fits is None:
            raise ValueError("--reserve: is kept free of what --fits names; leave it out, or both")
        if not 0 <= self.reserve < min(named, default=float("inf")):
            raise ValueError(
                f"--reserve: expected GiB from 0 to less than --fits, got {self.reserve:g}"
            )
        return {gib: int((gib - self.reserve) * 2**30) for gib in sorted(set(named))}


def run(
    terminal: Terminal,
    model: ArchitectureOptions,
    step: StepOptions,
    fit: FitOptions,
    output: Annotated[
        Path | None, described("Output", "--output -o PICTURE", "Draw stacked bars.")
    ] = None,
    force: Annotated[bool, described("Output", "--force", "Overwrite the picture.")] = False,
) -> None:
    """Estimate each method, search for the largest batches, show both."""
    limits = fit.limits()
    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    check_picture("--output", output, force=force)
    step.check_counts()
    from ..finetuning.base.models import build_empty
    from ..finetuning.run.facts import accounted_offload

    approximations, away = parse_approximation(step.approximate), step.away()
    step.check_parts()
    base, image_shape = build_empty(source, step.num_classes, step.image_size)
    if step.recompute is not None:
        from ..recomputation import recompute_by

        recompute_by(base, step.recompute)
    if approximations:
        from ..approximation import approximate

        approximate(base, **approximations)
    how = {**step.how(), **accounted_offload(away)}
    answers, missing = _ask(terminal, step, how, base, image_shape, limits)
    told = _described(next(iter(answers.values())).estimate, step.optimizer)
    title = ", ".join([source.name, told, *step.named()])
    if output is not None:
        from ..files.picture import save_picture
        from ..memory.figure import memory_figure

        estimates = {name: found.estimate for name, found in answers.items()}
        save_picture(memory_figure(estimates, title=title), output)
    value: dict[str, Any] = {"model": source.name, "optimizer_name": step.optimizer}
    value |= {n: told for n in _LESS if (told := getattr(step, n)) not in (None, "nothing")}
    values = {name: found.to_json() for name, found in answers.items()}
    value |= {"methods": values, "missing": missing}
    parts = _parts(answers, missing, title, terminal.out.width, fit.reserve)
    if output is not None:
        parts.append(f"written to {output}")
    terminal.show(value, *parts)


def _ask(
    terminal: Terminal,
    step: StepOptions,
    how: dict[str, Any],
    base: Any,
    image_shape: tuple[int, ...],
    limits: dict[float, int],
) -> tuple[dict[str, Answer], dict[str, str]]:
    """The answer of each row by name, and why others, of the table of all, have none."""
    from ..finetuning.job.given_plan import method_of
    from ..finetuning.preparation.fitted import check_has_state
    from ..memory.rows import Row, Rows, estimate_rows, methods_of
    from .planned_row import row_of_plan

    names = split_names(step.method, "--method")
    block = parse_block(step.from_block)
    made = Rows(base, image_shape)
    rows: dict[str, Callable[[], Row]] = {}
    if step.plan is not None:
        if len(names) > 1:
            raise ValueError(f"--plan: goes with one --method, got {', '.join(names)}")
        given = {"budget": parse_budget(step.budget), "rank": step.rank, "from_block": block}
        own = {option: value for option, value in given.items() if value is not None}
        # without a method they are for the other rows of the table
        name, planned = row_of_plan(names, step.plan, own if names or step.inference else {})
        rows[name] = lambda: planned
    if step.plan is None or (step.training and not names):
        methods = methods_of(names, parse_budget(step.budget), step.rank, block)
        of_methods = {name: functools.partial(made.of, own) for name, own in methods.items()}
        rows = {**of_methods, **rows} if step.training or names else {"plain": Row}

    def checked(make: Callable[[], Row]) -> Row:
        row = make()
        if row.plan is not None and step.away().state:
            check_has_state(row.method or method_of(row.plan))
        return row

    makers = {name: functools.partial(checked, make) for name, make in rows.items()}
    with terminal.progress() as progress:
        progress.start("estimating", len(rows))
        answers, missing = estimate_rows(
            base,
            image_shape,
            step.batch_size,
            makers,
            limits,
            how,
            functools.partial(progress.advance, 1),
        )
    for name, error in missing.items():
        if terminal.debug or name == "the plan":
            raise error
    reasons = {name: _reason(error) for name, error in missing.items()}
    if not answers:  # whatever is wrong, it is not one method
        raise ValueError(next(iter(reasons.values())))
    return answers, reasons


def _reason(error: BaseException) -> str:
    """One line; of what is not said for users also what kind of error it is."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _described(estimate: MemoryEstimate, optimizer: str) -> str:
    shape = " × ".join(map(str, estimate.batch_shape))
    at_once = estimate.micro_batch
    shape += f", {at_once} at a time" if at_once is not None else ""
    parts = [shape, estimate.dtype, estimate.device]
    parts += [optimizer] if estimate.training else ["inference"]
    return ", ".join(parts + ["checkpointing"] * estimate.checkpointing)


def _parts(
    answers: dict[str, Answer], missing: dict[str, str], title: str, columns: int, reserve: float
) -> list[Any]:
    from . import memory_display as display

    estimates = {name: found.estimate for name, found in answers.items()}
    if len(answers) == 1:
        [(name, estimate)] = estimates.items()
        parts: list[Any] = [f"{title}, {name}", "", display.category_table(estimate)]
    else:
        parts = [title, "", display.method_table(estimates)]
    parts += [f"{name}: left out, {reason}" for name, reason in missing.items()]
    parts += ["", display.bars(estimates, columns), ""]
    if any(found.found for found in answers.values()):
        found = {name: found.found for name, found in answers.items()}
        kept = f", {reserve:g} GiB kept free" if reserve else ""
        parts += [f"The largest batch, and its peak in GiB{kept}", display.fit_table(found), ""]
    none = {name: found for name, found in answers.items() if found.otherwise}
    if none:
        parts += ["Where none fits: the peak of the smallest step in GiB, as asked and otherwise"]
        parts += [display.otherwise_table(none), ""]
    if any(found.row.is_made_up for found in answers.values()):
        parts.append(_MADE_UP)
    return [*parts, _NOT_COUNTED[next(iter(estimates.values())).device]]
