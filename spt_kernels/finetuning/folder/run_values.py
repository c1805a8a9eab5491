"""What kinds of values there are in the JSON files of a run, as far as anybody reads them."""

from __future__ import annotations

from ...files.json_kinds import (
    AMOUNT,
    COUNT,
    COUNTS,
    FLAG,
    OBJECT,
    SHARE,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    Kinds,
    or_null,
)

_MODEL: Kinds = {
    "name": TEXT,
    "args": OBJECT,
    "weights": or_null(TEXT),
    "pretrained": FLAG,
    "new_head": FLAG,
}
# How many there were, by split; of a run that labels pixels how many it was tested on
_IMAGES = Kind(
    "whole numbers of 0 or more, by split",
    lambda value: all(map(COUNT.holds, value.values() if isinstance(value, dict) else [value])),
)
# By the names of `FILES`. Of a job, what is read without making one of it
RUN_VALUES: dict[str, Kinds] = {
    "config": {
        "kind": or_null(TEXT),
        "job": {
            "model": _MODEL,
            "images": {"root": TEXT},
            "data": TEXT,  # of a run that labels pixels
            "method": {
                "name": TEXT,
                "budget": or_null(AMOUNT),
                "rank": or_null(COUNT),
                "samples": COUNT,
                "rule": TEXT,
            },
            "recipe": {"seed": COUNT},
            "form": OBJECT,
            "sensitivity": or_null(TEXT),
            "plan": or_null(TEXT),
        },
        "classes": TEXTS,
        "images": {"training": COUNT, "validation": COUNT},
        "weights": or_null(OBJECT),
    },
    "result": {
        "method": TEXT,
        "test_accuracy": or_null(SHARE),
        "val_accuracy": or_null(SHARE),
        "miou": or_null(SHARE),
        "epochs": COUNT,
        "iterations": COUNT,
        "stopped_early": FLAG,
        "trained_parameters": COUNT,
        "structured_parameters": or_null(COUNT),
        "unstructured_parameters": or_null(COUNT),
        "backbone_parameters": SIZE,
        "images": _IMAGES,
        "task_bytes": COUNT,
        "accounted_peak_bytes": COUNT,
        "measured_peak_bytes": or_null(COUNT),
        "seconds": AMOUNT,
        "device": TEXT,
        "threads": COUNT,
        "versions": OBJECT,
    },
    "seconds": {"seconds": AMOUNT},
    "search": {"val_accuracy": SHARE, "prompts": COUNTS, "adapters": COUNTS, "loras": COUNTS},
    "predictions": {"image": TEXT, "label": TEXT, "predicted": TEXT},
    "measured": {"measured_on": OBJECT, "digest": TEXT, "seconds": AMOUNT},
}
