"""`spt-kernels merge`: a task folded into its base weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import described
from .saved_options import SavedOptions
from .terminal import Terminal, count, facts, size, unbroken
from .written import check_file

HELP = """Fold a task into its base model: one plain state dict.

  spt-kernels merge runs/photos -o merged.safetensors
  spt-kernels merge photos.safetensors -w vit.safetensors \\
      -o merged.safetensors

Nothing is left to compute at inference. Load it with
timm.create_model(name, num_classes=…) and load_state_dict, as any other; it
tells its classes and preprocessing, so that evaluate and predict take it, too.
"""


def run(
    terminal: Terminal,
    task: Annotated[Path, typer.Argument(help="A run's folder, or a task file.", metavar="RUN")],
    model: SavedOptions,
    output: Annotated[Path, described("Run", "--output -o FILE", "Where to write it.")],
    force: Annotated[bool, described("Run", "--force", "Overwrite the file.")] = False,
) -> None:
    """Load, merge, write."""
    if output.suffix != ".safetensors":  # what it is, and how other programs know it
        raise ValueError(f"--output: expected a name as merged.safetensors, got {output}")
    check_file("--output", output, force=force)
    from safetensors.torch import save

    from ..files.atomic import write_atomically
    from ..finetuning.description import as_header

    saved = model.find(task)
    state = {name: tensor.contiguous() for name, tensor in saved.merged().state_dict().items()}
    data = save(state, as_header(saved.description().to_json()))
    write_atomically(output, data)
    value = {
        "output": str(output),
        "file_bytes": len(data),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "model": saved.model.name,
        "num_classes": saved.num_classes,
    }
    lines = [
        ("model", f"{saved.model.name}, {saved.num_classes} classes"),
        ("parameters", f"{count(value['parameters'])} in {len(state)} tensors"),
        ("file", f"{unbroken(output)}, {size(len(data))}"),
    ]
    terminal.show(value, facts(lines))
