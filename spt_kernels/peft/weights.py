"""The tensors of a task as `adapter_model.safetensors` has them, and the way back.

Of a parameter `NAME` of the base model these are, below PEFT's `base_model.model.`:

* `NAME.spt_delta`: `[nnz]`, the trained deltas at the plan's positions.
* `NAME.spt_lora_a`, `NAME.spt_lora_b`, or `spt_down_weight` and so on of an Adapter.
* `NAME` itself: the head, what else was trained whole, and buffers that forwards have changed.

`spt_task` is JSON as bytes: the plan that the deltas belong to, the base values, told by
fingerprints, the names of what is there whole, to what that is tied, and the names of classes,
where a task file brought such along. The plan itself is the configuration's. PEFT adds the tables
of words that were resized, or that it was asked for, with all that is on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaFormatError
from ..plan import Plan
from ..task.file.fingerprint import Fingerprint
from ..task.file.format import TaskFile, structured_shapes

BASE = "base_model.model."
ABOUT = f"{BASE}spt_task"
_DELTA = ".spt_delta"
_FORMAT = 1
_TOLD = ("plan", "base", "recast", "model_name", "whole", "tied", "classes")


def to_tensors(task: TaskFile) -> dict[str, Tensor]:
    """Key -> tensor of everything in a task but its plan."""
    about: dict[str, Any] = {
        "format": _FORMAT,
        "plan": plan_digest(task.plan),
        "base": {name: task.base[name].to_json() for name in sorted(task.base)},
        "recast": {name: task.recast[name].to_json() for name in sorted(task.recast)},
        "model_name": task.model_name,
        "whole": sorted({*task.dense, *task.buffers}),
        "tied": {name: list(task.tied[name]) for name in sorted(task.tied)},
        "classes": list(task.metadata.get("classes", ())),
    }
    tensors = {ABOUT: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}
    tensors |= {f"{BASE}{name}{_DELTA}": values for name, values in task.values.items()}
    for name, parts in task.structured.items():
        tensors |= {f"{BASE}{name}.spt_{local}": part for local, part in parts.items()}
    return tensors | {f"{BASE}{name}": t for name, t in {**task.dense, **task.buffers}.items()}


def from_tensors(
    tensors: Mapping[str, Tensor], plan: Plan, parameters: Mapping[str, Tensor], adapter: str
) -> TaskFile:
    """The task that `to_tensors` took apart.

    Args:
        tensors: what it gave. Tables of words that PEFT has added, and that are others than the
            model's, are taken for trained whole.
        plan: of the adapter that it is loaded into.
        parameters: the base model's, by name; what else is whole is a buffer.
        adapter: name of the adapter, for messages.

    Raises:
        DeltaFormatError: something in it is not as it should be.
        ValueError: it was trained by another plan.
    """
    where = f"the weights for adapter {adapter!r}"
    about = _about(tensors, where)
    if about["plan"] != plan_digest(plan):
        raise ValueError(
            f"{where} were trained by another plan than it has: load them under another name, and "
            "their plan comes with them"
        )
    own = {key.removeprefix(BASE): tensor for key, tensor in tensors.items() if key != ABOUT}
    try:
        values = {name: own.pop(f"{name}{_DELTA}") for name in plan.unstructured}
        structured = {
            name: {local: own.pop(f"{name}.spt_{local}") for local in structured_shapes(spec)}
            for name, spec in plan.structured.items()
        }
        base, recast = (
            {name: Fingerprint.from_json(entry) for name, entry in about[key].items()}
            for key in ("base", "recast")
        )
        for name in own.keys() - about["whole"]:
            now = None if name in values | structured else parameters.get(name)
            if now is None or torch.equal(own[name].to(now), now):
                del own[name]
        dense = {name: tensor for name, tensor in own.items() if name in parameters}
        buffers = {name: tensor for name, tensor in own.items() if name not in parameters}
        return TaskFile(
            *(about["model_name"], plan, base, values, structured, dense, buffers),
            metadata={"classes": about["classes"]} if about["classes"] else {},
            recast=recast,
            tied={name: tuple(others) for name, others in about["tied"].items()},
        )
    except KeyError as error:
        raise DeltaFormatError(f"{where} lack the tensor {error}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise DeltaFormatError(f"{where}: {error}") from error


def plan_digest(plan: Plan) -> str:
    """128 bits of what a plan trains, as hex digits: positions, modules and head."""
    document = plan.to_json()
    digest = hashlib.blake2b(digest_size=16)
    what = [document["structured"], sorted(document["head"])]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for name in sorted(plan.unstructured):
        digest.update(name.encode() + b"\0")
        digest.update(plan.unstructured[name].numpy().tobytes() + b"\0")
    return digest.hexdigest()


def _about(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    if ABOUT not in tensors:
        raise DeltaFormatError(f"{where} lack the tensor {ABOUT}: they are not of SPT")
    try:
        about = json.loads(tensors[ABOUT].cpu().numpy().tobytes())
        if about["format"] > _FORMAT:
            raise DeltaFormatError(
                f"{where} are of format {about['format']}, newer than {_FORMAT}, which this "
                "version of spt_kernels reads: upgrade it"
            )
        about.setdefault("whole", [key.removeprefix(BASE) for key in tensors])  # before 0.8.0
        about = {"tied": {}, "classes": [], **about}  # before 0.8.3
        return {key: about[key] for key in _TOLD}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DeltaFormatError(f"{where}: {ABOUT} is damaged: {error!r}") from error
