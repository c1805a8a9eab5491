"""The measured sensitivity of a run: kept in its folder at once, and used again where it can be."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import torch

from .. import __version__
from ..errors import DeltaFormatError
from ..sensitivity import Sensitivity, measure_sensitivity
from ..task.file.fingerprint import Fingerprint
from .device import seed_everything
from .job import plain
from .pixels import Batches
from .progress import Progress
from .run_folder import FILES, RunFolder
from .setting import Setting


def sensitivity_of(setting: Setting, images: Batches, progress: Progress) -> Sensitivity:
    """Measure the sensitivities of the setting's model on its training images, onto the CPU."""
    samples = min(setting.job.method.samples, len(images.pixels))
    seed_everything(setting.job.recipe.seed)
    progress.start("measuring sensitivity", samples)
    seen = 0

    def on_samples(done: int, _total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    model = setting.base.model.to(setting.device)
    measured = measure_sensitivity(
        model, images, num_samples=samples, head=setting.job.method.head, progress=on_samples
    )
    model.to("cpu")
    return replace(measured, scores={name: score.cpu() for name, score in measured.items()})


def kept_sensitivity(
    folder: RunFolder, setting: Setting, progress: Progress
) -> tuple[Sensitivity | None, float]:
    """What was measured into `folder` before, if it would come out the same today.

    Returns:
        It, or `None`, and the seconds that it took.
    """
    record = folder.read_json("measured")
    if record is None or not folder["sensitivity"].is_file():
        return None, 0.0
    own = measured_on(setting)
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
    folder: RunFolder, setting: Setting, measured: Sensitivity, seconds: float
) -> None:
    """Write it, and what it was measured on; `seconds` is how long the run has taken so far."""
    folder["measured"].unlink(missing_ok=True)  # or a kill between the two leaves a wrong pair
    measured.save(folder["sensitivity"])
    record = {
        "measured_on": measured_on(setting),
        "digest": _digest(folder["sensitivity"].read_bytes()),
        "seconds": round(seconds, 1),
    }
    folder.write_json("measured", record)


def measured_on(setting: Setting) -> dict[str, Any]:
    """All that a measured sensitivity depends on, to the last bit, as plain JSON values."""
    recipe, train = setting.job.recipe, setting.splits.train
    state = setting.base.model.state_dict()
    weights = Fingerprint.of_all({name: (t, None, None) for name, t in state.items()})
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in train.paths]
    on_gpu = setting.device.type == "cuda"
    return plain(
        {
            "weights": _digest_of({name: own.to_json() for name, own in weights.items()}),
            "images": _digest_of([files, train.labels, train.classes]),
            "preprocessing": asdict(setting.form),
            "samples": setting.job.method.samples,
            "head": setting.job.method.head,
            # these give the same to a rounding, not to the bit
            "batch size": recipe.batch_size,
            "seed": recipe.seed,
            "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "versions": [__version__, torch.__version__],
        }
    )


def _digest_of(value: Any) -> str:
    return _digest(json.dumps(plain(value)).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
