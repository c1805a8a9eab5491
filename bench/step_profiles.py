"""Profiles a training step of several methods: where its time goes, on the card and on its host.

`python -m bench.step_profiles --output FILE`, with the sizes and precision of `spt-kernels bench`;
each method is written as soon as it is measured, and one that FILE has is left alone.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spt_kernels.cli.options import ModelOptions
from spt_kernels.costs import CostSetting
from spt_kernels.costs.machine import commit, describe
from spt_kernels.costs.measure import make_step, tuned_for
from spt_kernels.costs.step_profile import events_of, is_kernel, is_operator, profile_call
from spt_kernels.costs.timing import in_turn
from spt_kernels.files.atomic import write_atomically
from spt_kernels.finetuning.device import pick_device

METHODS = ("full", "peft-lora-16", "spt-lora", "spt-unstructured", "lora-16", "spt-adapter")
HOST_STEPS = 3  # that are profiled together
LINES = 25


def profiled(name: str, setting: CostSetting) -> dict[str, Any]:
    """What one method's step takes, and of what it consists."""
    plain = setting.build()
    shape = setting.image_shape(plain)
    step = make_step(tuned_for(name, plain, setting), shape, setting.batch_size, setting)
    (time,) = in_turn([step], setting)
    peak = 0
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    figures = asdict(profile_call(step, on_gpu=setting.on_gpu))
    return {
        "ms": asdict(time),
        "peak_bytes": peak,
        **figures,
        "top_us": _top(step, setting.on_gpu),
        "host": _host(step),
    }


def _top(step: Callable[[], object], on_gpu: bool) -> list[list[Any]]:
    """The kernels that take most; on a CPU operators. Name, count, microseconds."""
    count: Counter[str] = Counter()
    us: Counter[str] = Counter()
    is_counted = is_kernel if on_gpu else is_operator
    for event in filter(is_counted, events_of(step, on_gpu=on_gpu)):
        count[event.name] += 1
        us[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    return [[name[:100], count[name], round(took)] for name, took in us.most_common(LINES)]


def _host(step: Callable[[], object]) -> list[list[Any]]:
    """The Python functions that take most of themselves: name, calls a step, microseconds a step.

    Without autograd's own threads, so that backward is seen too.
    """
    seen = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        step()
        seen.enable()
        for _ in range(HOST_STEPS):
            step()
        seen.disable()
    rows = [
        [f"{Path(file).name}:{line} {name}", calls / HOST_STEPS, round(own / HOST_STEPS * 1e6)]
        for (file, line, name), (_, calls, own, _, _) in pstats.Stats(seen).stats.items()  # type: ignore[attr-defined]
    ]
    return sorted(rows, key=lambda row: -row[2])[:LINES]


def main(arguments: list[str] | None = None) -> int:
    """Profile what FILE lacks, print a line for each."""
    options = _parser().parse_args(arguments)
    source = ModelOptions(options.model, options.model_arg).source()
    assert source is not None
    setting = CostSetting(
        model=source.name,
        model_args=source.args,
        batch_size=options.batch_size,
        timed_batch_size=options.batch_size,
        dtype=options.dtype,
        device=str(pick_device(options.device)),
    )
    about = {"setting": setting.to_json(), "commit": commit()}
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    if {key: found.get(key) for key in about} != about:
        found = about | {"machine": asdict(describe(torch.device(setting.device))), "methods": {}}
    failed = False
    for name in METHODS:
        if name not in found["methods"]:
            try:
                found["methods"][name] = profiled(name, setting)
            except (ValueError, RuntimeError) as error:
                failed = True
                print(f"{name}: {type(error).__name__}: {error}")
                continue
            write_atomically(options.output, f"{json.dumps(found, indent=1)}\n".encode())
        print(_line(name, found["methods"]), flush=True)
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return int(failed)


def _line(name: str, methods: dict[str, Any]) -> str:
    one, rival = methods[name], methods.get("peft-lora-16")
    ms = one["ms"]["median_ms"]
    over = f" ({ms / rival['ms']['median_ms']:.2f} of peft-lora-16)" if rival else ""
    line = f"{name}: {ms:.1f} ms{over}, {one['operators']} operators"
    if one["peak_bytes"]:
        line += f", {one['kernels']} kernels of {one['kernel_ms']:.1f} ms, "
        line += f"{one['peak_bytes'] / 2**30:.2f} GiB"
    return line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.step_profiles", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16-autocast")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--model", default=CostSetting.model)
    parser.add_argument("--model-arg", action="append", metavar="KEY=VALUE")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
