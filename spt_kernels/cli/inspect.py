"""`spt-kernels inspect`: what is in a file that this package wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .plan import plan_figures
from .terminal import Terminal, count, facts, percent, size, table

HELP = """Show what is in a file or folder that this package wrote.

A task file, a plan, a sensitivity, a merged state dict, a run's folder:

  spt-kernels inspect runs/photos
  spt-kernels inspect runs/photos/task.safetensors
  spt-kernels inspect runs/photos/plan.safetensors --json

The file is checked on the way: a damaged one is an error.
"""


def run(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(help="The file or folder.", metavar="FILE")],
    tensors: Annotated[
        int, typer.Option("--tensors", help="Rows of the table of tensors.", show_default=True)
    ] = 20,
) -> None:
    """Find out what it is and show it."""
    if file.is_dir():
        value, parts = _folder(file)
    elif not file.is_file():
        raise ValueError(f"no such file: {file}")
    else:
        kind = kind_of(file)
        value, parts = _READERS[kind](file, tensors)
        value = {"kind": kind, "file_bytes": file.stat().st_size, **value}
    terminal.show(value, *parts)


def kind_of(file: Path) -> str:
    """A kind of `checked_file`, or `state-dict` for any other file.

    Raises:
        ValueError: it is a safetensors file that is cut or damaged.
    """
    from ..finetuning.weight_file import own_kind

    return own_kind(file) or "state-dict"


def _task(file: Path, limit: int) -> tuple[dict[str, Any], list[Any]]:
    from ..task.file.format import read

    task = read(file)
    shapes = {name: list(info.shape) for name, info in task.plan.info.items()}
    rows = [_row(n, "entries", shapes[n], v.numel(), v) for n, v in task.values.items()]
    for name, parts in task.structured.items():
        spec = task.plan.structured[name]
        kind = f"{'lora' if hasattr(spec, 'in_features') else 'adapter'} {spec.rank}"
        first = next(iter(parts.values()))
        rows.append(_row(name, kind, shapes[name], spec.num_parameters, first))
    rows += [_row(n, "whole", list(t.shape), t.numel(), t) for n, t in task.dense.items()]
    n_head = sum(t.numel() for t in task.dense.values())
    value = {
        "model": task.model_name,
        "trained_parameters": task.plan.num_trainable,
        "unstructured_parameters": task.plan.num_unstructured,
        "structured_parameters": task.plan.num_structured,
        "head_parameters": n_head,
        "tensors": rows,
    }
    lines = [
        ("task file", f"{file}, {size(file.stat().st_size)}, whole"),
        ("base model", task.model_name),
        ("trained parameters", count(task.plan.num_trainable)),
        ("  entry by entry", count(task.plan.num_unstructured)),
        ("  LoRA or Adapter", count(task.plan.num_structured)),
        ("head", count(n_head)),
        ("fingerprinted tensors", count(len(task.base))),
    ]
    return value, [facts(lines), "", _tensor_table(rows, limit)]


def _row(name: str, kind: str, shape: list[int], trained: int, values: Any) -> dict[str, Any]:
    dtype = str(values.dtype).removeprefix("torch.")
    return {"name": name, "kind": kind, "shape": shape, "trained": trained, "dtype": dtype}


def _tensor_table(rows: list[dict[str, Any]], limit: int) -> Any:
    shown = [
        (r["name"], r["kind"], "×".join(map(str, r["shape"])), count(r["trained"]), r["dtype"])
        for r in rows[:limit]
    ]
    if len(rows) > limit:
        shown.append((f"… {len(rows) - limit} more (--tensors)", "", "", "", ""))
    return table(("tensor", "how", "shape", "trained", "dtype"), shown)


def _plan(file: Path, _limit: int) -> tuple[dict[str, Any], list[Any]]:
    from ..plan import Plan

    plan = Plan.load(file)
    return plan_figures(plan), [plan.summary()]


def _sensitivity(file: Path, limit: int) -> tuple[dict[str, Any], list[Any]]:
    from ..sensitivity import Sensitivity

    measured = Sensitivity.load(file)
    sums = {name: float(scores.double().sum()) for name, scores in measured.items()}
    total = sum(sums.values()) or 1.0
    shares = {name: part / total for name, part in sums.items()}
    n_parameters = sum(what.numel for what in measured.info.values())
    value = {
        "model": measured.model_name,
        "samples": measured.num_samples,
        "parameters": n_parameters,
        "share": shares,
    }
    lines = [
        ("sensitivity", f"{file}, {size(file.stat().st_size)}, whole"),
        ("model", measured.model_name),
        ("images", count(measured.num_samples)),
        ("candidate parameters", f"{count(n_parameters)} in {len(sums)} tensors"),
    ]
    ranked = sorted(shares.items(), key=lambda item: -item[1])[:limit]
    rows = [
        (name, "×".join(map(str, measured.info[name].shape)), percent(share, 2))
        for name, share in ranked
    ]
    return value, [facts(lines), "", table(("tensor", "shape", "share of Σ g²"), rows)]


def _trained(file: Path, limit: int) -> tuple[dict[str, Any], list[Any]]:
    from ..files import checked_file

    document, state = checked_file.read(file, "trained", lambda *parts: parts)
    value, parts = _tensors(("trained values", "numbers"), state, file, limit)
    return {"model": document["model_name"], **value}, parts


def _state_dict(file: Path, limit: int) -> tuple[dict[str, Any], list[Any]]:
    from ..finetuning.weight_file import read_state_dicts

    groups = read_state_dicts(file).items()
    state = {
        f"{where}/{name}" if where else name: tensor
        for where, tensors in groups
        for name, tensor in tensors.items()
    }
    return _tensors(("state dict", "parameters"), state, file, limit)


def _tensors(
    names: tuple[str, str], state: dict[str, Any], file: Path, limit: int
) -> tuple[dict[str, Any], list[Any]]:
    rows: list[dict[str, Any]] = [
        {"name": name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in state.items()
    ]
    numel = sum(tensor.numel() for tensor in state.values())
    lines = [
        (names[0], f"{file}, {size(file.stat().st_size)}"),
        (names[1], f"{count(numel)} in {len(state)} tensors"),
    ]
    shown = [(r["name"], "×".join(map(str, r["shape"])), r["dtype"]) for r in rows[:limit]]
    if len(rows) > limit:
        shown.append((f"… {len(rows) - limit} more (--tensors)", "", ""))
    parts = [facts(lines), "", table(("tensor", "shape", "dtype"), shown)]
    return {names[1]: numel, "tensors": rows}, parts


def _folder(path: Path) -> tuple[dict[str, Any], list[Any]]:
    from ..finetuning.run_folder import FILES, RunFolder

    folder = RunFolder(path)
    config, result = folder.read_json("config"), folder.read_json("result")
    if config is None:
        raise ValueError(f"{path}: no run in this folder ({FILES['config']} is not there)")
    state = "finished" if result is not None else "unfinished; finetune --resume goes on with it"
    job = config["job"]
    files = {name: folder[name].stat().st_size for name in FILES if folder[name].is_file()}
    value = {"kind": "run", "finished": result is not None, **config, "result": result}
    lines = [
        ("run", f"{path}, {state}"),
        ("model", f"{job['model']['name']} with {job['model']['weights'] or 'timm weights'}"),
        ("images", f"{job['images']['root']}: {', '.join(config['classes'][:8])}"),
        ("method", job["method"]["name"]),
    ]
    if result is not None:
        lines += [
            ("test accuracy", percent(result["test_accuracy"])),
            ("trained parameters", count(result["trained_parameters"])),
        ]
    rows = [(FILES[name], size(bytes_)) for name, bytes_ in files.items()]
    return value, [facts(lines), "", table(("file", "size"), rows)]


_READERS = {
    "task": _task,
    "plan": _plan,
    "sensitivity": _sensitivity,
    "trained": _trained,
    "state-dict": _state_dict,
}
