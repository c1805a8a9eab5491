"""Memory against time of a training step with parts computed again, beside what else does that.

`python -m bench.recompute_frontier FILE.json` rehearses, without a card, SPT-LoRA and PEFT LoRA-16
on ViT-B/16 with `spt.recompute` (every level, and plans in between), with whole blocks
(`set_grad_checkpointing`), and with selective checkpointing of `torch.utils.checkpoint`. Memory is
accounted, time is told by the figures of a card (`spt_kernels.fitting.Card`): neither is measured.
`--measure` adds to a file how long steps take on this CPU; `--draw PICTURE` draws it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from spt_kernels.costs.machine import commit, describe
from spt_kernels.files.atomic import write_atomically
from spt_kernels.files.picture import (
    COLOURS,
    INK,
    dress,
    new_figure,
    put_heading,
    put_legend,
    put_title,
    save_picture,
)
from spt_kernels.fitting import CARDS, Card, Levels
from spt_kernels.fitting.levels import LEVELS as ALL_LEVELS
from spt_kernels.memory import Rehearsal, made_up_plan
from spt_kernels.methods import Method, tune
from spt_kernels.recomputation import RecomputeWords, recompute

from .markdown import markdown

CARD = CARDS["H100"]
IMAGES = 2  # of a step that is timed on a CPU
SETTINGS = {
    "224, fp32": (224, "fp32"),
    "224, autocast": (224, "bf16-autocast"),
    "224, bf16": (224, "bf16"),
    "384, autocast": (384, "bf16-autocast"),
}
METHODS = ("spt-lora", "peft-lora-16")
LEVELS = ALL_LEVELS[1:]  # but nothing
BATCH, PLANS = 64, 6

_aten: Any = torch.ops.aten
_ATTENTIONS = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default}
POLICIES = {"products kept": _ATTENTIONS | _PRODUCTS, "attention kept": _ATTENTIONS}

Row = dict[str, Any]


class Selective(nn.Module):
    """A block of which selective checkpointing keeps the results of some operators."""

    def __init__(self, block: nn.Module, kept: set[Any]) -> None:
        super().__init__()
        self.block, self._kept = block, kept

    def forward(self, x: Tensor, **named: Any) -> Tensor:
        """What the block gives."""
        contexts = partial(create_selective_checkpoint_contexts, self._policy)
        output: Tensor = checkpoint(
            self.block, x, use_reentrant=False, context_fn=contexts, **named
        )
        return output

    def _policy(self, context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = func in self._kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def tuned(method: str, size: int) -> nn.Module:
    """ViT-B/16 for images of `size` pixels, tuned by made-up scores where it takes any."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", img_size=size, num_classes=100)
    chosen = Method(method)
    return tune(model, chosen, made_up_plan(model, chosen, (3, size, size))).model


@dataclass(frozen=True)
class Told:
    """Tells rows of one precision, size and method."""

    setting: str
    method: str
    card: Card

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input."""
        size = SETTINGS[self.setting][0]
        return (BATCH, 3, size, size)

    def model(self) -> nn.Module:
        """Tuned anew."""
        return tuned(self.method, self.shape[-1])

    def rehearsal(self, model: nn.Module, **options: Any) -> Rehearsal:
        """Of a step in the midst of training: the optimizer has its state."""
        dtype = SETTINGS[self.setting][1]
        made = Rehearsal(model, dtype=dtype, image_shape=self.shape[1:], **options)
        made.at(self.shape)
        return made

    def row(self, way: str, what: str, rehearsal: Rehearsal) -> Row:
        """What one step takes."""
        estimate, work = rehearsal.with_work(self.shape)
        return {
            "setting": self.setting,
            "method": self.method,
            "way": way,
            "what": what,
            "peak_bytes": estimate.peak_bytes,
            "seconds": self.card.seconds_of(work, captured=True),
            "commit": commit(),
        }

    def rows(self) -> Iterator[Row]:
        """Every way to compute again."""
        yield from self.others()
        rehearsal = self.rehearsal(self.model())
        for level in LEVELS:
            rehearsal.recompute(level)
            yield self.row("spt.recompute", level, rehearsal)
        if self.method == METHODS[0]:
            dtype = SETTINGS[self.setting][1]
            levels = Levels(self.model(), self.shape, self.card, dtype=dtype)
            for memory_bytes in levels.between(PLANS):
                words = str(RecomputeWords.of(levels.plan(memory_bytes).blocks))
                rehearsal.recompute(words)
                yield self.row("spt.recompute", words, rehearsal)

    def others(self) -> Iterator[Row]:
        """Nothing computed again, and what there is besides `spt.recompute`."""
        yield self.row("nothing", "", self.rehearsal(self.model()))
        yield self.row("whole blocks", "", self.rehearsal(self.model(), checkpointing=True))
        for name, kept in POLICIES.items():
            if self.method == METHODS[0] and kept & _PRODUCTS:
                continue  # it adds into its products in place, which the policy refuses
            model = self.model()
            is_wrapped = hasattr(model, "base_model")
            blocks: Any = model.get_submodule("base_model.model.blocks" if is_wrapped else "blocks")
            for place, block in enumerate(blocks):
                blocks[place] = Selective(block, kept)
            yield self.row(f"torch, {name}", "", self.rehearsal(model))


def measured(images: int = IMAGES, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Seconds of a step on this CPU over those of one that computes nothing again, by method.

    All ways take turns in every round, and of their ratios within a round the median counts: what
    else the machine does hits them alike.
    """
    found: dict[str, dict[str, float]] = {}
    batch, target = torch.randn(images, 3, 224, 224), torch.zeros(images, dtype=torch.int64)
    for method in METHODS:
        model = tuned(method, 224).train()
        ratios: dict[str, list[float]] = {level: [] for level in ("", *LEVELS, "whole blocks")}
        for turn in range(rounds + 1):
            seconds = {}
            for way in ratios:
                if way == "whole blocks":
                    recompute(model, "nothing")
                    switch_on_checkpointing(model)
                else:
                    recompute(model, way.split(",") if way else "nothing")
                began = time.perf_counter()
                F.cross_entropy(model(batch), target).backward()
                seconds[way] = time.perf_counter() - began
                model.zero_grad(set_to_none=True)
                switch_on_checkpointing(model, False)
            if turn:  # the first one warms up
                for way, own in seconds.items():
                    ratios[way].append(own / seconds[""])
        found[method] = {way or "nothing": statistics.median(own) for way, own in ratios.items()}
    return found


def switch_on_checkpointing(model: nn.Module, on: bool = True) -> None:
    """timm's checkpointing of whole blocks, of a model that PEFT may have wrapped."""
    inner: Any = getattr(model, "base_model", model)
    inner = getattr(inner, "model", inner)
    inner.set_grad_checkpointing(on)


MARKS = {
    "nothing": "o",
    "spt.recompute": ".",
    "whole blocks": "s",
    "torch, attention kept": "v",
    "torch, products kept": "^",
}


def draw(data: dict[str, Any], picture: Path) -> None:
    """A panel for each setting: GiB, the card's milliseconds, and what `spt.recompute` reaches."""
    figure = new_figure(6.6)
    panels = figure.subplots(2, 2).flatten()
    for axes, setting in zip(panels, SETTINGS, strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=False):
            is_own = {"setting": setting, "method": method}.items()
            rows = [row for row in data["rows"] if is_own <= row.items()]
            for way, mark in MARKS.items():
                points = _points([row for row in rows if row["way"] == way])
                if points:
                    axes.plot(*zip(*points, strict=True), mark, color=colour, markersize=4.5)
            ours = [row for row in rows if row["way"] in ("nothing", "spt.recompute")]
            axes.plot(*zip(*_points(frontier(ours)), strict=True), color=colour, linewidth=1)
        put_title(axes, setting)
        axes.set_xlabel("GiB, accounted")
        axes.set_ylabel(f"ms by the {data['card']}'s figures")
    dress(*panels)
    put_heading(figure, f"A training step of ViT-B/16, batch {BATCH}: what is computed again")
    lines = [
        Line2D([], [], color=colour, label=f"{method}, by spt.recompute")
        for method, colour in zip(METHODS, COLOURS, strict=False)
    ]
    marks = [
        Line2D([], [], marker=mark, color=INK, linestyle="", markersize=4.5, label=way)
        for way, mark in MARKS.items()
    ]
    put_legend(figure, [*lines, *marks], 3)
    save_picture(figure, picture)


def _points(rows: list[Row]) -> list[tuple[float, float]]:
    return [(row["peak_bytes"] / 2**30, 1e3 * row["seconds"]) for row in rows]


def table(data: dict[str, Any]) -> str:
    """Of each way MiB, and milliseconds a step by the card's figures, as Markdown."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in data["rows"]:
        if row["way"] == "spt.recompute" and row["what"] not in LEVELS:
            continue  # a plan, which only a picture shows
        way = f"`{row['what']}`" if row["what"] else row["way"]
        cell = f"{row['peak_bytes'] / 2**20:,.0f} · {1e3 * row['seconds']:.1f}"
        found.setdefault((row["method"], way), {})[row["setting"]] = cell
    cpu = data.get("on_this_cpu", {}).get("ratios", {})
    rows = [
        [method, way, *(cells.get(setting, "–") for setting in SETTINGS), _on_cpu(cpu, method, way)]
        for (method, way), cells in found.items()
    ]
    return markdown(["method", "computed again", *SETTINGS, "a CPU's time"], rows)


def _on_cpu(ratios: dict[str, dict[str, float]], method: str, way: str) -> str:
    """Of a step that computes nothing again, as measured; a dash for what was not."""
    found = ratios.get(method, {}).get(way.strip("`"))
    return "–" if found is None else f"{found:.2f}"


def frontier(rows: list[Row]) -> list[Row]:
    """Those that no other row equals or beats in both memory and time."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["peak_bytes"], row["seconds"])):
        if not front or row["seconds"] < front[-1]["seconds"]:
            front.append(row)
    return front


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--draw", type=Path, metavar="PICTURE")
    parser.add_argument("--table", action="store_true", help="print a file as Markdown")
    parser.add_argument("--measure", action="store_true", help="add ratios of times on this CPU")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.file.read_text())))
        return
    if arguments.measure:
        data = json.loads(arguments.file.read_text())
        machine = asdict(describe(torch.device("cpu")))
        told = {"machine": machine, "commit": commit(), "images": IMAGES}
        data["on_this_cpu"] = told | {"ratios": measured()}
        write_atomically(arguments.file, json.dumps(data, indent=1).encode() + b"\n")
        return
    if arguments.draw is not None:
        draw(json.loads(arguments.file.read_text()), arguments.draw)
        return
    about = {"accounted": True, "card": CARD.name, "torch": torch.__version__}
    rows: list[Row] = []
    for setting in SETTINGS:
        for method in METHODS:
            for row in Told(setting, method, CARD).rows():
                print(json.dumps(row), flush=True)
                rows.append(row)
            text = json.dumps(about | {"rows": rows}, indent=1)
            write_atomically(arguments.file, text.encode() + b"\n")


if __name__ == "__main__":
    main()
