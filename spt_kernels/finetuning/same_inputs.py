"""Whether the images of a run that goes on are those that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CLASSES, IMAGES = "classes", "images"  # of a run's config


def told_of_images(training: Iterable[Any], validation: Iterable[Any]) -> dict[str, Any]:
    """What a run's config tells of its images, by which they are known again.

    Args:
        training: of each image its name and what belongs to it, as JSON values.
        validation: likewise, of those to choose by.
    """
    parts = [list(training), list(validation)]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    return {"training": len(parts[0]), "validation": len(parts[1]), "digest": digest}


def check_as_begun(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other images.

    What was learnt would stand for other classes, or what was held out would be trained on.

    Args:
        begun: the config of the run so far; that of an older version tells its classes alone.
        now: the config as it would be today.

    Raises:
        ValueError: there are other classes, or other images to train on or to choose by.
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


_REMEDY = "put them back as they were, or begin anew in another folder"


def _counted(told: Mapping[str, Any]) -> str:
    return f"{told['training']:,} training and {told['validation']:,} validation images"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, … ({len(names)})"
