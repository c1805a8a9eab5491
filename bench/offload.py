"""What weights on the host save and what fetching them costs: accounted of large ViTs, or measured.

`python -m bench.offload account --output FILE` needs no card, nor does `states`, which accounts for
full training with the optimizer's state on the host; `table FILE` prints what either wrote, and
`measure --output FILE` runs steps on a card (`--device cpu` tries it on a tiny model).
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spt_kernels as spt
from spt_kernels.costs import CostSetting
from spt_kernels.costs.machine import commit, describe
from spt_kernels.costs.measure import make_step, tuned_for
from spt_kernels.costs.timing import in_turn
from spt_kernels.files.atomic import write_atomically
from spt_kernels.finetuning.device import pick_device
from spt_kernels.memory import Rehearsal
from spt_kernels.offloading import blocks_on_host

from .markdown import markdown

MODELS = {"vit_large_patch16_224": "ViT-L/16", "vit_huge_patch14_224": "ViT-H/14"}
DTYPES = ("bf16-autocast", "bf16")
BATCHES = (1, 16, 64)
STATES_BATCH = 16
# what is trained, and what is offloaded of it: gradients go through every block, or the last alone
WAYS = {"spt-lora": "frozen", "partial-1": "forward-only"}
SHAPE, CLASSES = (3, 224, 224), 100
GB_PER_S = (25, 50)  # what PCIe 4.0 and 5.0 x16 give to pinned memory, about
# The step by which a card's speed is told: ViT-B/16, LoRA-16, autocast, batch 64, as one CUDA graph
# on an H100 (docs/ON_A_CARD.md)
KNOWN_STEP = ("vit_base_patch16_224", 64, 24.0)  # model, images, ms
MEASURED_ROWS = [(model, batch) for model in MODELS for batch in BATCHES]


def meta_model(name: str) -> nn.Module:
    """An architecture of timm without values."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=CLASSES)
    return model


def forward_flops(name: str) -> int:
    """Floating-point operations of a forward of one image."""
    model = meta_model(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *SHAPE, device="meta"))
    return int(counter.get_total_flops())


def step_flops(name: str, way: str) -> int:
    """Of a step of one image: a forward, and the gradients of the inputs where they go through."""
    blocks = len(meta_model(name).blocks)  # type: ignore[arg-type]
    share = 1.0 if way == "spt-lora" else 2 / blocks  # a block whose weights have gradients too
    return round((1 + share) * forward_flops(name))


def card_flops_per_ms() -> float:
    """What an H100 does in a millisecond of a step, as far as one measured step tells."""
    name, images, ms = KNOWN_STEP
    return images * step_flops(name, "spt-lora") / ms


def accounted() -> Iterator[dict[str, Any]]:
    """A row for each model, precision, way and batch."""
    speed = card_flops_per_ms()
    for name in MODELS:
        model = meta_model(name)
        for way, what in WAYS.items():
            flops = step_flops(name, way)
            for dtype in DTYPES:
                how = {"method": way, "dtype": dtype, "image_shape": SHAPE}
                plain = Rehearsal(model, **how)
                offloaded = Rehearsal(model, offload=what, **how)
                for batch in BATCHES:
                    usual, less = (r.at((batch, *SHAPE)) for r in (plain, offloaded))
                    yield {
                        **{"model": name, "method": way, "offload": what, "dtype": dtype},
                        "batch": batch,
                        "peak_bytes": usual.peak_bytes,
                        "offloaded_peak_bytes": less.peak_bytes,
                        "host_bytes": less.host_bytes,
                        "fetched_bytes": less.fetched_bytes,
                        "fetch_ms": {str(r): less.fetched_bytes / r / 1e6 for r in GB_PER_S},
                        "compute_ms": batch * flops / speed,
                    }


def accounted_states() -> Iterator[dict[str, Any]]:
    """Full training under autocast with the state of AdamW on the card and on the host."""
    optimizers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "peak_bytes": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "offloaded_peak_bytes": lambda model: spt.OffloadedAdamW(model.parameters(), fused=True),
    }
    for name in MODELS:
        row: dict[str, Any] = {"model": name, "method": "full", "batch": STATES_BATCH}
        for label, optimizer in optimizers.items():
            found = spt.estimate_memory(
                meta_model(name),
                (STATES_BATCH, *SHAPE),
                method="full",
                dtype="bf16-autocast",
                optimizer=optimizer,
            )
            row[label] = found.peak_bytes
        row["host_bytes"], row["fetched_bytes"] = found.host_bytes, found.fetched_bytes
        # as many bytes go back, on the same stream
        row["fetch_ms"] = {str(rate): 2 * found.fetched_bytes / rate / 1e6 for rate in GB_PER_S}
        yield row


def states_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `accounted_states` as Markdown."""
    titles = (
        *("model, trained", "batch", "peak GiB", "state offloaded", "on the host"),
        *(f"there and back at {rate} GB/s" for rate in GB_PER_S),
    )
    cells = [
        (
            f"{MODELS[row['model']]}, {row['method']}",
            str(row["batch"]),
            *(
                f"{row[n] / 2**30:.2f}"
                for n in ("peak_bytes", "offloaded_peak_bytes", "host_bytes")
            ),
            *(f"{row['fetch_ms'][str(rate)]:.0f} ms" for rate in GB_PER_S),
        )
        for row in rows
    ]
    return markdown(titles, cells)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `accounted` as Markdown."""
    titles = (
        *("model, trained", "precision", "batch", "peak GiB", "offloaded", "on the host"),
        *("fetched", *(f"at {rate} GB/s" for rate in GB_PER_S), "computes"),
    )
    cells = []
    for row in rows:
        fetch = [f"{row['fetch_ms'][str(rate)]:.0f} ms" for rate in GB_PER_S]
        gib = ("peak_bytes", "offloaded_peak_bytes", "host_bytes", "fetched_bytes")
        cells.append(
            (
                f"{MODELS[row['model']]}, {row['method']}",
                row["dtype"].replace("bf16-autocast", "autocast"),
                str(row["batch"]),
                *(f"{row[name] / 2**30:.2f}" for name in gib),
                *fetch,
                f"{row['compute_ms']:.0f} ms",
            )
        )
    return markdown(titles, cells)


def measured(setting: CostSetting, way: str, what: str) -> dict[str, Any]:
    """Times and peaks of a step with weights on the card, on the host, and on the card again."""
    plain = setting.build()
    tunable = tuned_for(way, plain, setting)
    step = make_step(tunable, setting.image_shape(plain), setting.batch_size, setting)
    found: dict[str, Any] = {}
    for label, where in (("on_card", "nothing"), ("on_host", what), ("on_card_again", "nothing")):
        spt.offload(tunable.model, where)
        blocks = blocks_on_host(tunable.model)
        (time,) = in_turn([step], setting)
        before = sum(block.fetched_bytes for block in blocks)
        found[label] = {"ms": asdict(time), "peak_bytes": _peak(step, on_gpu=setting.on_gpu)}
        if blocks:
            fetched = sum(block.fetched_bytes for block in blocks) - before
            found[label] |= {"fetched_bytes": fetched}
    return found


def _peak(step: Callable[[], object], *, on_gpu: bool) -> int:
    if not on_gpu:
        step()
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _settings(device: str) -> list[CostSetting]:
    if device.startswith("cuda"):
        usual = CostSetting(num_classes=CLASSES, dtype="bf16-autocast", device=device)
        return [replace(usual, model=model, batch_size=batch) for model, batch in MEASURED_ROWS]
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48}
    tiny = CostSetting("vit_tiny_patch16_224", sizes, 2, 2, device=device, rounds=1)
    return [replace(tiny, dtype="bf16-autocast")]


def main(arguments: list[str] | None = None) -> int:
    """Account or measure, and write every row as it comes; or print a table of what was written."""
    options = _parser().parse_args(arguments)
    if options.command == "table":
        rows = json.loads(options.file.read_text())["rows"]
        print(states_table(rows) if rows[0]["method"] == "full" else table(rows))
        return 0
    is_accounted = options.command != "measure"
    device = "cpu" if is_accounted else str(pick_device(options.device))
    machine = asdict(describe(torch.device(device)))
    about = {"commit": commit(), "machine": machine}
    if is_accounted:  # the same on every machine
        about = {"versions": machine["versions"]}
    found: dict[str, Any] = {**about, "accounted": is_accounted, "rows": []}

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        write_atomically(options.output, f"{json.dumps(found, indent=1)}\n".encode())

    if is_accounted:
        for row in accounted() if options.command == "account" else accounted_states():
            keep(row)
        return 0
    for setting in _settings(device):
        way = "spt-lora"
        row = measured(setting, way, WAYS[way])
        keep({"setting": setting.to_json(), "method": way, **row})
        ms = [row[label]["ms"]["median_ms"] for label in ("on_card", "on_host")]
        gib = [row[label]["peak_bytes"] / 2**30 for label in ("on_card", "on_host")]
        print(
            f"{setting.model}, batch {setting.batch_size}: {ms[0]:.1f} ms {gib[0]:.2f} GiB, "
            f"offloaded {ms[1]:.1f} ms {gib[1]:.2f} GiB",
            flush=True,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.offload", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("account", "states", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True, metavar="FILE")
        if name == "measure":
            command.add_argument("--device", default="auto")
    commands.add_parser("table").add_argument("file", type=Path)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
