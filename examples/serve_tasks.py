"""Several tasks over one base model in memory: a request names its task, the model takes it.

python examples/serve_tasks.py flowers.safetensors pets.safetensors --model vit_base_patch16_224
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import nn

import spt_kernels as spt

SMOKE = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def random_task(base: nn.Module, path: Path) -> Path:
    """A task that nobody trained: random biases."""
    spt.methods["bias"](base)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, base.parameters()):
            parameter.normal_(std=0.1)
    spt.save_delta(base, path)
    spt.unload(base)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Answer a request for each task in turn, twice: the answers must be the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=Path, nargs="*")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--output", type=Path, default=Path("."), help="of --smoke: its files")
    parser.add_argument("--smoke", action="store_true", help="tiny and random, to see it run")
    args = parser.parse_args(arguments)
    shape = SMOKE if args.smoke else {"pretrained": True}
    base = timm.create_model(args.model, **shape).eval()
    made = [args.output / f"{name}.safetensors" for name in ("flowers", "pets")]
    tasks = [random_task(base, path) for path in made] if args.smoke else args.tasks
    bank = spt.TaskBank(base)
    for path in tasks:  # a file of another base is refused
        bank.load(str(path), path)  # names are free: finetune calls every file task.safetensors
    images = torch.randn(2, *timm.data.resolve_data_config(shape, model=base)["input_size"])
    first, again = {}, {}
    for answers in (first, again):
        for name in bank:
            with bank.using(name) as model, torch.inference_mode():
                answers[name] = model(images)
    for name, scores in first.items():
        same = torch.equal(scores, again[name])
        print(f"{name}: {tuple(scores.shape)}, the same after other tasks: {same}")


if __name__ == "__main__":
    main()
