"""The measured sensitivity of a run: kept in its folder at once, and used again where it can be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import __version__
from ...distributed import Processes
from ...errors import DeltaFormatError
from ...methods import Method
from ...sensitivity import Sensitivity, measure_sensitivity
from ...task.file.fingerprint import Fingerprint
from ..base.models import ModelSource
from ..device import seed_everything
from ..folder.run_folder import FILES, RunFolder
from ..images.pixels import Batches
from ..job.job import plain
from ..progress import Progress
from ..run.run import Run
from ..run.setting import Setting
from .fitted import samples_at_once


def sensitivity_of(
    setting: Setting, images: Batches, progress: Progress, at_once: int | None = None
) -> Sensitivity:
    """Measure the sensitivities of the setting's model on its training images, onto the CPU.

    Args:
        setting: whose model is plain.
        images: to measure on.
        progress: told of it.
        at_once: samples at a time; left out, it is found out, as `samples_at_once` does.
    """
    job = setting.job
    samples = min(job.method.samples, len(images.pixels))
    model = setting.base.model.to(setting.device)
    measured = measure_on(
        model,
        _parts_of(images, at_once or samples_at_once(setting)),
        F.cross_entropy,
        samples,
        job.method,
        job.recipe.seed,
        progress,
        setting.processes,
    )
    model.to("cpu")
    return measured


def _parts_of(
    batches: Iterable[tuple[Tensor, Tensor]], most: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """The same images, no more than so many at a time."""
    return (
        part
        for images, labels in batches
        for part in zip(images.split(most), labels.split(most), strict=True)
    )


def measure_on(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Any, Any], Tensor],
    samples: int,
    method: Method,
    seed: int,
    progress: Progress,
    processes: Processes | None = None,
) -> Sensitivity:
    """Measure the sensitivities of a model where it is, onto the CPU; the seed is set before."""
    processes = processes or Processes()
    seed_everything(seed)
    progress.start("measuring sensitivity", processes.share(samples))
    seen = 0

    def on_samples(done: int, _total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    measured = measure_sensitivity(
        model,
        batches,
        loss_fn,
        samples,
        head=method.head,
        progress=on_samples,
        group=processes.group,
    )
    return replace(measured, scores={name: score.cpu() for name, score in measured.items()})


def measured_once(
    run: Run[Any], own: Mapping[str, Any], measure: Callable[[], Sensitivity]
) -> Sensitivity | None:
    """The sensitivity that was measured into the run's folder before, or else is measured now.

    The first process looks for it and keeps it; one that was there before is None in the others.

    Args:
        run: under way.
        own: all that the measurement depends on, as `evidence_of` has it.
        measure: what does it, if it must be done.
    """
    run.keeps_measured = True
    kept, took = None, 0.0
    if run.processes.is_first:
        kept, took = kept_sensitivity(run.folder, own, run.log)
    run.clock.spent = max(run.clock.spent, took)
    if run.processes.from_first(lambda: kept is not None):
        return kept
    if not run.folder.replaces:  # the run that is there stays until this one is known to go
        run.claim()
    measured = measure()
    if run.processes.is_first:
        keep_sensitivity(run.folder, own, measured, run.clock())
    return measured


def kept_sensitivity(
    folder: RunFolder, own: Mapping[str, Any], progress: Progress
) -> tuple[Sensitivity | None, float]:
    """What was measured into `folder` before, if it would come out the same today.

    Args:
        folder: of the run.
        own: as `measured_on` gives it, of today.
        progress: told of it.

    Returns:
        It, or `None`, and the seconds that it took.
    """
    record = folder.read_json("measured")
    if record is None or not folder["sensitivity"].is_file():
        return None, 0.0
    was = record.get("measured_on", {})
    if other := [name for name, value in own.items() if was.get(name) != value]:
        progress.say(
            f"{FILES['sensitivity']} was measured with other {', '.join(other)}: measured anew"
        )
        return None, 0.0
    if _digest(folder["sensitivity"].read_bytes()) != record.get("digest"):
        progress.say(f"{FILES['sensitivity']} is not the one that was measured: measured anew")
        return None, 0.0
    try:
        kept = Sensitivity.load(folder["sensitivity"])
    except DeltaFormatError as reason:  # of an older version of the package
        progress.say(f"{reason}: measured anew")
        return None, 0.0
    progress.say(f"the sensitivity that was measured before is used again, {FILES['sensitivity']}")
    return kept, float(record.get("seconds", 0.0))


def keep_sensitivity(
    folder: RunFolder, own: Mapping[str, Any], measured: Sensitivity, seconds: float
) -> None:
    """Write it, and what it was measured on; `seconds` is how long the run has taken so far."""
    folder["measured"].unlink(missing_ok=True)  # or a kill between the two leaves a wrong pair
    measured.save(folder["sensitivity"])
    record = {
        "measured_on": dict(own),
        "digest": _digest(folder["sensitivity"].read_bytes()),
        "seconds": round(seconds, 1),
    }
    folder.write_json("measured", record)


def measured_on(setting: Setting, at_once: int) -> dict[str, Any]:
    """All that a run's sensitivity, measured so many samples at a time, depends on."""
    recipe, train = setting.job.recipe, setting.splits.train
    return evidence_of(
        setting.job.model,
        setting.base.model,
        setting.job.method,
        [dated(train.paths), train.labels, train.classes],
        asdict(setting.form),
        at_once,
        recipe.seed,
        setting.device,
    )


def evidence_of(
    source: ModelSource,
    model: nn.Module,
    method: Method,
    images: Any,
    form: Any,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """All that a measured sensitivity depends on, to the last bit, as plain JSON values."""
    state = model.state_dict()
    weights = Fingerprint.of_all({name: (t, None, None) for name, t in state.items()})
    on_gpu = device.type == "cuda"
    return plain(
        {
            # the same weights are read otherwise by another activation, or number of heads
            "model": [source.name, source.args],
            "weights": _digest_of({name: own.to_json() for name, own in weights.items()}),
            "images": _digest_of(images),
            "preprocessing": form,
            "samples": method.samples,
            "head": method.head,
            # these give the same to a rounding, not to the bit
            "batch size": batch_size,
            "seed": seed,
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "versions": [__version__, torch.__version__],
        }
    )


def dated(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Files with their sizes and the times of their last changes."""
    stats = ((path, path.stat()) for path in paths)
    return [(str(path), own.st_size, own.st_mtime_ns) for path, own in stats]


def _digest_of(value: Any) -> str:
    return _digest(json.dumps(plain(value)).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
