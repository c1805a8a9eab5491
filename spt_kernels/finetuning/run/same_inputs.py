"""Whether the images and base weights of a run that goes on are those that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...model import head_names
from ...model.digest import digests_by_name
from ..base.models import ModelSource

CLASSES, IMAGES, WEIGHTS = "classes", "images", "weights"  # of a run's config
_PIECE = 1 << 20  # bytes of a file at a time


def told_of_images(training: Iterable[Any], validation: Iterable[Any]) -> dict[str, Any]:
    """What a run's config tells of its images, by which they are known again.

    Args:
        training: of each image its name and what belongs to it, as JSON values.
        validation: likewise, of those to choose by.
    """
    parts = [list(training), list(validation)]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    return {"training": len(parts[0]), "validation": len(parts[1]), "digest": digest}


def told_of_weights(source: ModelSource, model: nn.Module) -> dict[str, Any] | None:
    """What a run's config tells of its file of weights, or of timm's own; `None` without any.

    A file is known by its bytes. Of timm's, whose file may be exchanged in its cache and in the
    hub, what it has made of the model is, but for the head, which may be a fresh one.

    Args:
        source: what was built.
        model: as it was built.
    """
    if source.pretrained:
        head = set(head_names(model))
        told = digests_by_name({n: t for n, t in model.state_dict().items() if n not in head})
        digest = hashlib.blake2b(json.dumps([*told.items()]).encode(), digest_size=16)
        return {"tensors": len(told), "digest": digest.hexdigest()}
    return None if source.weights is None else told_of_file(source.weights)


def told_of_file(weights: str) -> dict[str, Any]:
    """The same of a file of weights."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with open(weights, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "digest": digest.hexdigest()}


def check_as_begun(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other images, or on other weights.

    What was learnt would stand for other classes or be of no use, or what was held out be trained
    on.

    Args:
        begun: the config of the run so far; that of an older version tells its classes alone.
        now: the config as it would be today.

    Raises:
        ValueError: there are other classes, or other images to train on or to choose by; or the
            file of weights, or timm's own, is another one.
    """
    was, are = begun.get(CLASSES), now[CLASSES]
    if was is not None and list(was) != list(are):
        raise ValueError(
            f"data: the run began with the classes {_listed(was)}, now there are {_listed(are)}; "
            f"{_REMEDY}"
        )
    known, found = begun.get(IMAGES), now[IMAGES]
    if known is not None and known != found:
        raise ValueError(
            f"data: the run began with {_counted(known)}, now there are {_counted(found)}, not "
            f"all of the same names; {_REMEDY}"
        )
    held, there = begun.get(WEIGHTS), now[WEIGHTS]
    if held is not None and held != there and "tensors" in held:
        raise ValueError(
            "pretrained: the run began with other weights than timm gives the model now, as after "
            f"it has fetched others; {_REMEDY}"
        )
    if held is not None and held != there:
        raise ValueError(
            f"weights: the run began with other values in this file ({held['bytes']:,} bytes then, "
            f"{there['bytes']:,} now); {_REMEDY}"
        )


_REMEDY = "put them back as they were, or begin anew in another folder"


def _counted(told: Mapping[str, Any]) -> str:
    return f"{told['training']:,} training and {told['validation']:,} validation images"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, … ({len(names)})"
