"""`spt-kernels merge`: a task folded into its base weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import described
from .saved_options import SavedOptions
from .scenes import find_segmentation
from .terminal import Terminal, count, facts, size, unbroken
from .written import check_file, check_spared

HELP = """Fold a task into its base model: one plain state dict.

Of a run, or of a task file that came alone:

  spt-kernels merge runs/photos -o merged.safetensors
  spt-kernels merge photos.safetensors -w vit.safetensors \\
      -o merged.safetensors

Nothing is left to compute at inference. The ending of FILE tells its format:
.safetensors, or torch's .pt, .pth, .bin. Load it with
timm.create_model(name, num_classes=…) and load_state_dict, as any other; tune
it further with -w; or evaluate and predict with it. A .safetensors file tells
its classes and preprocessing:

  spt-kernels evaluate merged.safetensors -d photos
  spt-kernels evaluate merged.pt -m vit_base_patch16_224 -d photos
"""


def run(
    terminal: Terminal,
    context: typer.Context,
    task: Annotated[Path, typer.Argument(help="A run's folder, or a task file.", metavar="RUN")],
    model: SavedOptions,
    output: Annotated[Path, described("Run", "--output -o FILE", "Where to write it.")],
    force: Annotated[bool, described("Run", "--force", "Overwrite the file.")] = False,
) -> None:
    """Load, merge, write."""
    from ..finetuning.run.merged_file import check_merged_name, write_merged

    try:
        check_merged_name(output)
    except ValueError as error:
        raise ValueError(f"--output: {error}") from error
    check_file("--output", output, force=force)
    saved = find_segmentation(context, model, task, ()) or model.find(task)
    check_spared("--output", output, task=saved.path, base_weights=saved.model.weights)
    state = saved.merged().state_dict()
    n_bytes = write_merged(output, state, saved.description().to_json())
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
        ("file", f"{unbroken(output)}, {size(n_bytes)}"),
    ]
    terminal.show(value, facts(lines))
