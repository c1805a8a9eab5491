"""`spt-kernels inspect`: what is in a file that this package wrote, or tunable in a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import ArchitectureOptions, described
from .plan import plan_figures
from .terminal import Terminal, count, facts, percent, size, table, unbroken

_NUM_CLASSES = 1000  # of the head, which no plan counts

Shown = tuple[dict[str, Any], list[Any]]  # for a machine, for a person

HELP = """Show what is in a file or folder that this package wrote, or tunable in a model.

A task file, a plan, a sensitivity, a merged state dict, a run's folder:

  spt-kernels inspect runs/photos
  spt-kernels inspect runs/photos/task.safetensors
  spt-kernels inspect runs/photos/plan.safetensors --json

The file is checked on the way: a damaged one is an error.

An architecture, without any weights: how the sensitivity of each kind of its
parameters is measured, what may be put on them, what stays frozen:

  spt-kernels inspect -m convnext_tiny
"""


def run(
    terminal: Terminal,
    model: ArchitectureOptions,
    file: Annotated[
        Path | None, typer.Argument(help="The file or folder.", metavar="FILE", show_default=False)
    ] = None,
    tensors: Annotated[
        int, described("Output", "--tensors N", "Rows of the table of tensors [20].")
    ] = 20,
    image_size: Annotated[
        int | None, described("Model", "--image-size N", "Side of its images [the model's own].")
    ] = None,
) -> None:
    """Find out what it is and show it."""
    if tensors < 0:
        raise ValueError(f"--tensors: expected 0 or more, got {tensors}")
    source = model.source()
    if (file is None) == (source is None):
        raise ValueError("inspect: name a file or folder, or a --model, one of them")
    if source is not None:
        value, parts = _model(source, image_size)
    elif file is None or image_size is not None:
        raise ValueError("--image-size: goes with --model")
    elif file.is_dir():
        value, parts = _folder(file)
    elif not file.is_file():
        raise ValueError(f"no such file: {file}")
    else:
        from ..finetuning.run.description import kind_of

        kind = kind_of(file)
        value, parts = _READERS[kind](terminal, file, tensors)
        value = {"kind": kind, "file_bytes": file.stat().st_size, **value}
    terminal.show(value, *parts)


def _task(_: Terminal, file: Path, limit: int) -> Shown:
    from ..plan.table import in_numeric_order
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
    order = {name: place for place, name in enumerate(in_numeric_order(task.plan.info))}
    rows.sort(key=lambda row: order.get(row["name"], len(order)))  # what is not in it is the head's
    n_head = sum(t.numel() for t in task.dense.values())
    told, told_lines = _told(file)
    value = {
        "model": task.model_name,
        "trained_parameters": task.plan.num_trainable,
        "unstructured_parameters": task.plan.num_unstructured,
        "structured_parameters": task.plan.num_structured,
        "head_parameters": n_head,
        "metadata": told,
        "tensors": rows,
    }
    lines = [
        ("task file", f"{unbroken(file)}, {size(file.stat().st_size)}, whole"),
        ("base model", task.model_name),
        *told_lines,
        ("trained parameters", count(task.plan.num_trainable)),
        ("  entry by entry", count(task.plan.num_unstructured)),
        ("  LoRA or Adapter", count(task.plan.num_structured)),
        ("head", count(n_head)),
        ("fingerprinted tensors", count(len(task.base))),
    ]
    quantized = Counter(print_.quantization for print_ in task.base.values())
    del quantized[""]
    value["quantized"] = dict(quantized)
    if quantized:
        told_of = [f"{count(n)} to {kind}" for kind, n in sorted(quantized.items())]
        lines.append(("  quantized in the base", ", ".join(told_of)))
    return value, [facts(lines), "", _tensor_table(rows, limit)]


def _told(file: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The metadata of a file as JSON and as facts."""
    from ..finetuning.run.description import KEYS, SEGMENTATION, Description, metadata_of

    told = dict(metadata_of(file))
    known = Description.from_json(told)
    lines = []
    if known.model is not None:
        lines.append(("built as", _model_text(vars(known.model))))
    if known.classes:
        lines.append((f"{len(known.classes)} classes", _names(known.classes)))
    if known.form is not None:
        form = known.form
        # a scene is neither squashed nor cropped, but seen in windows
        how = "windows of scenes" if SEGMENTATION in told else form.fit
        lines.append(("images", f"{form.size} × {form.size}, {how}, {form.interpolation}"))
    lines += [(name, unbroken(json.dumps(told[name]))) for name in told if name not in KEYS]
    return told, lines


def _model_text(source: Mapping[str, Any]) -> str:
    args = ", ".join(f"{name}={value}" for name, value in source["args"].items())
    weights = "timm's weights" if source["pretrained"] else "no weights"
    with_ = unbroken(source["weights"]) if source["weights"] is not None else weights
    return f"{source['name']}{f' ({args})' if args else ''} with {with_}"


def _names(classes: Sequence[str]) -> str:
    shown = ", ".join(map(unbroken, classes[:8]))
    return shown if len(classes) <= 8 else f"{shown}, … ({len(classes)})"


def _row(name: str, kind: str, shape: list[int], trained: int, values: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "shape": shape, "trained": trained, "dtype": _dtype(values)}


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor_table(rows: list[dict[str, Any]], limit: int) -> Any:
    shown = [
        (r["name"], r["kind"], _shape(r["shape"]), count(r["trained"]), r["dtype"]) for r in rows
    ]
    return _first(("tensor", "how", "shape", "trained", "dtype"), shown, limit)


def _first(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], limit: int) -> Any:
    """A table of the first rows, which says how many there are besides."""
    shown = list(rows[:limit])
    if len(rows) > limit:
        shown.append((f"… {len(rows) - limit} more (--tensors)", *[""] * (len(columns) - 1)))
    return table(columns, shown)


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _plan(terminal: Terminal, file: Path, _limit: int) -> Shown:
    from ..plan import Plan

    plan = Plan.load(file)
    return plan_figures(plan), [plan.summary(terminal.out.width)]


def _sensitivity(_: Terminal, file: Path, limit: int) -> Shown:
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
        ("sensitivity", f"{unbroken(file)}, {size(file.stat().st_size)}, whole"),
        ("model", measured.model_name),
        ("images", count(measured.num_samples)),
        ("candidate parameters", f"{count(n_parameters)} in {len(sums)} tensors"),
    ]
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    rows = [(name, _shape(measured.info[name].shape), percent(share, 2)) for name, share in ranked]
    return value, [facts(lines), "", _first(("tensor", "shape", "share of Σ g²"), rows, limit)]


def _trained(_: Terminal, file: Path, limit: int) -> Shown:
    from ..files import checked_file

    document, state = checked_file.read(file, "trained", lambda *parts: parts)
    value, parts = _tensors(("trained values", "numbers"), state, file, limit)
    return {"model": document["model_name"], **value}, parts


def _state_dict(_: Terminal, file: Path, limit: int) -> Shown:
    from ..finetuning.base.weight_file import read_state_dicts

    groups = read_state_dicts(file).items()
    state = {
        f"{where}/{name}" if where else name: tensor
        for where, tensors in groups
        for name, tensor in tensors.items()
    }
    return _tensors(("state dict", "parameters"), state, file, limit)


def _tensors(names: tuple[str, str], state: dict[str, Any], file: Path, limit: int) -> Shown:
    from ..plan.table import in_numeric_order

    rows: list[dict[str, Any]] = [
        {"name": n, "shape": list(state[n].shape), "dtype": _dtype(state[n])}
        for n in in_numeric_order(state)
    ]
    numel = sum(tensor.numel() for tensor in state.values())
    told, told_lines = _told(file)
    lines = [
        (names[0], f"{unbroken(file)}, {size(file.stat().st_size)}"),
        (names[1], f"{count(numel)} in {len(state)} tensors"),
        *told_lines,
    ]
    shown = [(r["name"], _shape(r["shape"]), r["dtype"]) for r in rows]
    parts = [facts(lines), "", _first(("tensor", "shape", "dtype"), shown, limit)]
    return {names[1]: numel, "metadata": told, "tensors": rows}, parts


def _model(source: Any, image_size: int | None) -> Shown:
    from ..finetuning.base.models import build_empty
    from ..memory import tunable_parts

    base, image_shape = build_empty(source, _NUM_CLASSES, image_size)
    shares = tunable_parts(base, image_shape)
    total = sum(share.numel for share in shares)
    tunable = sum(share.numel for share in shares if not share.why)
    value = {
        "kind": "model",
        "model": source.name,
        "image_shape": list(image_shape),
        "parameters": total,
        "tunable": tunable,
        "shares": [share.to_json() for share in shares],
    }
    lines = [
        ("model", _model_text(vars(source))),
        ("images", " × ".join(map(str, image_shape))),
        ("parameters", count(total)),
        ("tunable by a plan", f"{count(tunable)}, {percent(tunable / total)}"),
    ]
    rows = [
        (s.kind, count(s.tensors), count(s.numel), s.measured, s.why or s.takes) for s in shares
    ]
    columns = ("parameters of", "tensors", "numbers", "measured", "trained as")
    return value, [facts(lines), "", table(columns, rows, has_prose=True)]


def _folder(path: Path) -> Shown:
    from ..finetuning.folder.run_folder import FILES, RunFolder

    folder = RunFolder(path)
    config, result = folder.read_config(), folder.read_json("result")
    if config is None:
        raise ValueError(
            f"{path}: no run in this folder ({FILES['config']} is not there, or another's)"
        )
    job = config["job"]
    labels_pixels = "data" in job  # a run of `segment`
    command = "segment" if labels_pixels else "finetune"
    state = "finished" if result else f"unfinished; {command} --resume goes on with it"
    root = job["data"] if labels_pixels else job["images"]["root"]
    files = {name: folder[name].stat().st_size for name in FILES if folder[name].is_file()}
    value = {"kind": "run", "finished": result is not None, **config, "result": result}
    lines = [
        ("run", f"{unbroken(path)}, {state}"),
        ("model", _model_text(job["model"])),
        ("images", f"{unbroken(root)}: {_names(config['classes'])}"),
        ("method", job["method"]["name"]),
    ]
    if result is not None:
        score = ("mIoU", "miou") if labels_pixels else ("test accuracy", "test_accuracy")
        lines += [
            (score[0], percent(result[score[1]])),
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
