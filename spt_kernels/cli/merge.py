"""`spt-kernels merge`: a task folded into its base weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import ModelOptions, described
from .terminal import Terminal, count, facts, size

HELP = """Fold a task into its base model: one plain state dict.

  spt-kernels merge runs/photos -o merged.safetensors
  spt-kernels merge photos.safetensors -m vit_base_patch16_224 \\
      -w vit.safetensors -o merged.safetensors

Nothing is left to compute at inference. The ending of FILE tells its format: .safetensors,
or torch's .pt, .pth, .bin. Load it with timm.create_model(name, num_classes=…) and
load_state_dict, as any other; tune it further with -w; or evaluate it:

  spt-kernels evaluate merged.safetensors -d photos
  spt-kernels evaluate merged.pt -m vit_base_patch16_224 -d photos
"""


def run(
    terminal: Terminal,
    task: Annotated[Path, typer.Argument(help="A run's folder, or a task file.", metavar="RUN")],
    model: ModelOptions,
    output: Annotated[Path, described("Run", "--output -o FILE", "Where to write it.")],
    force: Annotated[bool, described("Run", "--force", "Overwrite the file.")] = False,
) -> None:
    """Load, merge, write."""
    from ..finetuning.merged_file import MergedAbout, check_merged_name, write_merged
    from ..finetuning.saved_run import SavedRun

    try:
        check_merged_name(output)
    except ValueError as error:
        raise ValueError(f"--output: {error}") from error
    if output.is_dir() or not output.parent.is_dir():
        what = f"{output} is a folder" if output.is_dir() else f"no such folder: {output.parent}"
        raise ValueError(f"--output: {what}")
    if output.exists() and not force:
        raise ValueError(f"--output: {output} is there already; --force overwrites it")
    saved = SavedRun.find(task, model.source())
    state = saved.merged().state_dict()
    about = None
    if saved.classes and saved.form is not None:
        about = MergedAbout(saved.model, saved.classes, saved.form)
    n_bytes = write_merged(output, state, about)
    value = {
        "output": str(output),
        "file_bytes": n_bytes,
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "model": saved.model.name,
        "num_classes": saved.num_classes,
    }
    lines = [
        ("model", f"{saved.model.name}, {saved.num_classes} classes"),
        ("parameters", f"{count(value['parameters'])} in {len(state)} tensors"),
        ("file", f"{output}, {size(n_bytes)}"),
    ]
    terminal.show(value, facts(lines))
