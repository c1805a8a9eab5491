"""Whether the processes that share a run have found the same images, weights and options."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

from ...model.digest import digests_of_model
from ..images.labelled import named_images
from ..job.recipe import HOW_IT_FITS
from .setting import Setting

_FOUND = {"data": "images", "weights": "weights", "method": "options", "recipe": "options"}


def check_alike(setting: Setting) -> None:
    """Refuse processes of which one would train something else than the others.

    Args:
        setting: whose model is plain.

    Raises:
        ValueError: in each process: which one has found something else, and what.
    """
    if setting.processes.size == 1:
        return
    job, splits = setting.job, setting.splits
    recipe = {n: v for n, v in asdict(job.recipe).items() if n not in ("preset", *HOW_IT_FITS)}
    told = {
        "data": [*map(named_images, (splits.train, splits.val, splits.test)), asdict(setting.form)],
        "weights": digests_of_model(setting.base.model),
        "method": asdict(job.method),
        "recipe": recipe,
    }
    own = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in told.items()}
    found = setting.processes.gather(own)
    for rank, other in enumerate(found):
        for name, what in _FOUND.items():
            if other[name] != found[0][name]:
                raise ValueError(
                    f"{name}: process {rank} has found other {what} than process 0: expected the "
                    "same in all of them, and the same files on every machine"
                )
