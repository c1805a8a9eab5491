"""The LoRA of a tuned model as a folder of PEFT's LoRA, which needs nothing of this package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor, nn

from ..files.atomic import write_atomically
from ..model.quantized import logical_shape
from ..model.tied import identity_of
from ..plan import LoraSpec
from ..task.base_model import BaseModel, unwrap
from ..task.delta import task_of
from ..task.file.format import TaskFile
from .weights import BASE

Sparse = Literal["refuse", "leave out"]


def export_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, sparse: Sparse = "refuse"
) -> None:
    """Write the LoRA and what is trained whole as `PeftModel.from_pretrained` of PEFT reads it.

    A LoRA on several row ranges of a matrix, as on q and v of a fused qkv, becomes one of their
    ranks together, with zeros where a range has no rows. Modules of which something is trained
    whole, as the head, are saved whole, as PEFT does with `modules_to_save`.

    Args:
        model: tuned by a plan with LoRA; in a `PeftModel` or not.
        folder: for `adapter_config.json` and `adapter_model.safetensors`, made if it is not there.
        sparse: what becomes of deltas of single entries, which PEFT's LoRA has no place for: refuse
            if there are any, or leave them out, so that the outputs are others than the model's. A
            plan without them is `dataclasses.replace(plan, unstructured={})`.

    Raises:
        ValueError: the model is not tuned, has no LoRA, or an Adapter; there are sparse deltas and
            they are not to be left out; what is trained whole is no parameter of a module that PEFT
            can save alone, or is tied to another module's; `sparse` is something else.
        OSError: the folder cannot be written.
    """
    if sparse not in ("refuse", "leave out"):
        raise ValueError(f"sparse must be 'refuse' or 'leave out', got {sparse!r}")
    bare = unwrap(model)
    task = task_of(bare)
    plan = task.plan
    if plan.num_unstructured and sparse == "refuse":
        raise ValueError(
            f"sparse: {plan.num_unstructured:,} single entries are trained besides, which PEFT's "
            "LoRA cannot hold: give sparse='leave out' to lose them, or save the model by "
            "save_pretrained or save_delta"
        )
    specs: dict[str, LoraSpec] = {}
    for name, spec in plan.structured.items():
        if not isinstance(spec, LoraSpec):
            raise ValueError(f"{name} has an Adapter, which is no LoRA")
        specs[name.removesuffix(".weight")] = spec
    if not specs:
        raise ValueError("the model has no LoRA: its plan trains single entries alone")

    modules, tensors = _saved_whole(bare, task)
    for name, spec in specs.items():
        shape = logical_shape(bare.get_parameter(f"{name}.weight"))
        parts = task.structured[f"{name}.weight"]
        down, up = _stacked(spec, parts["lora_a"], parts["lora_b"], shape[0])
        kernel = (1,) * (len(shape) - 2)  # of a convolution
        tensors[f"{name}.lora_A.weight"] = down.reshape(*down.shape, *kernel)
        tensors[f"{name}.lora_B.weight"] = up.reshape(*up.shape, *kernel)
    os.makedirs(folder, exist_ok=True)
    _config(bare, specs, modules).save_pretrained(os.fspath(folder))
    file = save({f"{BASE}{name}": t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
    write_atomically(Path(folder) / SAFETENSORS_WEIGHTS_NAME, file)


def _config(model: nn.Module, specs: Mapping[str, LoraSpec], modules: list[str]) -> LoraConfig:
    ranks = {name: len(spec.rows) * spec.rank for name, spec in specs.items()}
    alphas = {name: spec.scale * ranks[name] for name, spec in specs.items()}  # scaling = alpha / r
    rank, alpha = max(ranks.values()), max(alphas.values())
    # to PEFT a name stands for all modules whose names end in it
    endings = {n: [m for m, _ in model.named_modules() if m.endswith(f".{n}")] for n in specs}
    own = {name: f"^{re.escape(name)}" if endings[name] else name for name in specs}
    is_exact = specs.keys() >= {other for others in endings.values() for other in others}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={own[name]: r for name, r in ranks.items() if r != rank},
        alpha_pattern={own[name]: a for name, a in alphas.items() if a != alpha},
        lora_dropout=max(spec.dropout for spec in specs.values()),
        target_modules=list(specs) if is_exact else "|".join(map(re.escape, specs)),
        modules_to_save=modules or None,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        inference_mode=True,
    )


def _stacked(spec: LoraSpec, lora_a: Tensor, lora_b: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The LoRA of all row ranges as one: `[ranges · rank, in]` and `[rows, ranges · rank]`."""
    up = lora_b.new_zeros(rows, len(lora_a))
    first = 0
    for place, (start, stop) in enumerate(spec.rows):
        own = slice(place * spec.rank, (place + 1) * spec.rank)
        up[start:stop, own] = lora_b[first : first + stop - start]
        first += stop - start
    return lora_a, up


def _saved_whole(model: nn.Module, task: TaskFile) -> tuple[list[str], dict[str, Tensor]]:
    """Modules that PEFT is to save whole, and what is in them."""
    now = BaseModel.of(model)
    for other, parameter in model.named_parameters(remove_duplicate=False):
        for name in task.dense.keys() - {other}:
            if identity_of(parameter) == identity_of(now.parameters[name]):
                raise ValueError(
                    f"{name} is trained whole and tied to {other}, of which PEFT would train a "
                    "copy: merge the task and save the whole model, or save the task by "
                    "save_pretrained or save_delta"
                )
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in task.dense))
    found: dict[str, Tensor] = {}
    for module in modules:
        inside = {n: t for n, t in {**now.parameters, **now.buffers}.items() if t is not None}
        inside = {n: t for n, t in inside.items() if module and n.startswith(f"{module}.")}
        if not inside or inside.keys() & {*task.plan.structured, *task.plan.unstructured}:
            name = next(n for n in task.dense if n.rpartition(".")[0] == module)
            raise ValueError(
                f"{name} is trained whole, and is of no module that PEFT could save: the one that "
                "has it is the model, or has tuned layers"
            )
        others = [n for n, _ in model.named_modules() if n.endswith(module) and n != module]
        if others:  # as `modules_to_save` are matched
            raise ValueError(f"PEFT would save {others[0]}, too, whose name ends in {module!r}")
        found |= {n: task.dense.get(n, t.detach()).to(t.dtype).clone() for n, t in inside.items()}
    lost = sorted(task.buffers.keys() - found.keys())
    if lost:
        raise ValueError(f"forwards have changed the buffer {lost[0]}, which PEFT would not save")
    return modules, found
