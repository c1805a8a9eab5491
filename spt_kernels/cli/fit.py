"""`spt-kernels fit`: how to train in a given memory, and what that takes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..methods import METHODS
from ..offloading import OffloadWords
from .options import ArchitectureOptions, BudgetOfMethods, SizeOptions, described, split_names
from .terminal import Terminal, table
from .training_options import OFFLOAD_HELP, parse_budget
from .written import check_picture

if TYPE_CHECKING:
    from ..finetuning.base.models import ModelSource
    from ..fitting import MethodWay

HELP = """How to train in the memory of your card, in the least time.

A batch may be trained on a few images at a time, and the backward may
compute parts of the model again that the forward then need not keep: both
give the same result, the first up to rounding. Of all ways that fit, the
fastest, and the options of finetune for it:

  spt-kernels fit -m vit_base_patch16_224 --gib 8
  spt-kernels fit -m vit_large_patch16_224 --gib 6 --image-size 384

Several methods side by side, for another card; the picture of memory
against time, in which a method that lies above another is never better:

  spt-kernels fit -m vit_base_patch16_224 --gib 4 --card "RTX 4060" \\
      --method spt-lora,lora-16,full -o frontier.png

No card is needed. Memory is accounted. Times are a model: arithmetic and
traffic of the step over the figures of the card, as an H100 reached them;
they compare ways, and are no promise. finetune --memory 8GiB does the same
by itself. The exit code is 1 where nothing fits.
"""

NOTHING_FITS = 1  # exit code

_DTYPES = ("fp32", "bf16-autocast")  # that finetune trains in
_AMP = {"fp32": (), "bf16-autocast": ("--amp", "bf16")}


@dataclass(frozen=True)
class FittingOptions(SizeOptions):
    """What is trained, on which card."""

    gib: Annotated[
        float | None, described("Fit", "--gib N", "Memory of the card in GiB, as 8 or 11.5.")
    ] = None
    reserve: Annotated[
        float,
        described(
            "Fit",
            "--reserve GIB",
            "Keep so much of it free, for the CUDA context and the allocator [1].",
        ),
    ] = 1.0
    card: Annotated[
        str | None,
        described("Fit", "--card NAME", "Whose speed counts, as H100 [this one's, or RTX 3060]."),
    ] = None
    method: Annotated[
        str, described("Step", "--method A,B,…", f"{', '.join(METHODS)} [spt-lora].")
    ] = "spt-lora"
    budget: BudgetOfMethods = None
    rank: Annotated[
        int | None, described("Step", "--rank R", "Of LoRA and Adapter [8; lora's 16].")
    ] = None
    dtype: Annotated[
        str, described("Step", "--dtype A,B", "fp32, bf16-autocast or both [both].")
    ] = ",".join(_DTYPES)
    offload: Annotated[str | None, described("Step", "--offload WHAT", OFFLOAD_HELP)] = None

    def limit_bytes(self) -> int:
        """What a step may take."""
        if self.gib is None:
            raise ValueError("--gib: name the GiB of your card, as --gib 8")
        if not 0 < self.gib < 2**20:
            raise ValueError(f"--gib: expected the GiB of a card, as 8, got {self.gib}")
        if not 0 <= self.reserve < self.gib:
            raise ValueError(
                f"--reserve: {self.reserve:g} GiB kept free (1 unless it is given) leave nothing "
                f"of --gib {self.gib:g}: give less, as --reserve 0"
            )
        return int((self.gib - self.reserve) * 2**30)

    def dtypes(self) -> tuple[str, ...]:
        """The precisions to try."""
        names = split_names(self.dtype)
        for name in names:
            if name not in _DTYPES:
                raise ValueError(f"--dtype: expected of {', '.join(_DTYPES)}, got {name!r}")
        return names or _DTYPES


def run(
    terminal: Terminal,
    model: ArchitectureOptions,
    what: FittingOptions,
    output: Annotated[
        Path | None,
        described("Output", "--output -o PICTURE", "Draw memory against time; takes longer."),
    ] = None,
    force: Annotated[bool, described("Output", "--force", "Overwrite the picture.")] = False,
) -> int:
    """Look for the fastest way of each method and precision, show them; the exit code."""
    limit, dtypes, away = what.limit_bytes(), what.dtypes(), OffloadWords.parse(what.offload)
    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    check_picture("--output", output, force=force)
    what.check_counts()
    from ..finetuning.base.models import build_empty
    from ..finetuning.preparation.fitted import check_has_state
    from ..finetuning.run.facts import accounted_offload
    from ..fitting import compare_ways
    from ..memory.rows import methods_of

    names = split_names(what.method)
    if not names:
        raise ValueError("--method: name one or more")
    methods = methods_of(names, parse_budget(what.budget), what.rank)
    for method in methods.values() if away.state else ():
        check_has_state(method)
    card = _card(what.card)
    base, image_shape = build_empty(source, what.num_classes, what.image_size)
    with terminal.progress() as progress:
        progress.start("looking for ways", len(methods) * len(dtypes))
        ways = compare_ways(
            base,
            (what.batch_size, *image_shape),
            methods,
            limit,
            dtypes=dtypes,
            card=card,
            with_others=output is not None,
            on_trial=progress.advance,
            captured=not away,
            state_on_host=away.state,
            **accounted_offload(away),
        )
    batch = f"{source.name}, batches of {what.batch_size} × {' × '.join(map(str, image_shape))}"
    title = f"{batch}, {limit / 2**30:.2f} GiB of {what.gib:g}"
    title += f", {what.offload} on the host" if away else ""
    if output is not None:
        from ..files.picture import save_picture
        from ..fitting.figure import frontier_figure

        drawn = {f"{way.method}, {way.dtype}": list(way.others) for way in ways}
        save_picture(frontier_figure(drawn, limit, title=f"{batch}, {card.name}"), output)
    besides = _besides(source, what)
    value = {
        "model": source.name,
        "card": card.name,
        "limit_bytes": limit,
        "batch": what.batch_size,
        "ways": [_to_json(way, besides) for way in ways if way.fits],
        "too_large": [_to_json(way, besides) for way in ways if not way.fits],
    }
    parts: list[Any] = [title, "", _table(ways), ""]
    if ways[0].fits:
        parts.append(f"The fastest, of {what.batch_size} images on an {card.name} by its figures:")
        parts.append(f"  {_command(model, ways[0], besides)}")
    else:
        parts.append(
            "Nothing fits: the least of each is shown. Smaller images, a smaller model or "
            "another method need less."
        )
    if output is not None:
        parts += ["", f"written to {output}"]
    terminal.show(value, *parts)
    return 0 if ways[0].fits else NOTHING_FITS


def _besides(source: ModelSource, what: FittingOptions) -> list[str]:
    """Options of finetune for a step like those that were rehearsed, whichever way is taken."""
    from ..finetuning.base.models import sized_for

    besides: list[str] = []
    # of one size, so that finetune must build it so; not each such model tells what its images have
    if sized_for(source, what.num_classes, what.image_size) != source:
        besides += ["--model-arg", f"img_size={what.image_size}"]
    given = {
        "--image-size": what.image_size,
        "--budget": what.budget,
        "--rank": what.rank,
        "--offload": what.offload,
    }
    for option, value in given.items():
        besides += [] if value is None else [option, str(value)]
    return besides


def _card(name: str | None) -> Any:
    from ..fitting import card_of

    try:
        return card_of(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _table(ways: list[MethodWay]) -> Any:
    fastest = ways[0].way.seconds
    rows = []
    for of_method in ways:
        way = of_method.way
        time = f"{way.seconds / fastest:.2f}" if of_method.fits else "does not fit"
        at_a_time = f"{way.micro_batch} of {way.batch}" if way.parts > 1 else "all"
        again = way.recompute.replace(",", " ") or "nothing"
        peak = f"{way.peak_bytes / 2**30:.2f}"
        rows.append((of_method.method, of_method.dtype, at_a_time, again, peak, time))
    columns = ("method", "precision", "at a time", "computed again", "GiB", "time")
    return table(columns, rows, is_wide=True)


def _to_json(of_method: MethodWay, besides: list[str]) -> dict[str, Any]:
    way = of_method.way
    return {
        "method": of_method.method,
        "dtype": of_method.dtype,
        "micro_batch": way.micro_batch,
        "parts": way.parts,
        "recompute": way.recompute or None,
        "peak_bytes": way.peak_bytes,
        "modelled_step_ms": round(1e3 * way.seconds, 2),
        "options": [*_AMP[of_method.dtype], *way.options, *besides],
    }


def _command(model: ArchitectureOptions, of_method: MethodWay, besides: list[str]) -> str:
    way = of_method.way
    options = ["-m", str(model.model)]
    options += [word for pair in model.model_arg or [] for word in ("--model-arg", pair)]
    options += ["--method", of_method.method, "--batch-size", str(way.batch)]
    options += [*_AMP[of_method.dtype], *way.options, *besides]
    return shlex.join(["spt-kernels", "finetune", *options]) + " …"
